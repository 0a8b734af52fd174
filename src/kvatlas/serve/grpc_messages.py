"""Between protobuf messages and our values."""

from __future__ import annotations

import time
from array import array

import msgspec

from kvatlas.config import ApiSettings
from kvatlas.errors import RequestError, TokenizationError, TokenizationReason
from kvatlas.proto.indexer.v1 import indexer_pb2
from kvatlas.proto.kvatlas.v1 import kvatlas_pb2
from kvatlas.results import BlockLocality, PodScore, PodStatus, ScoreResult, TokensInfo
from kvatlas.serve.prompts import AskedPrompt, chat_prompt
from kvatlas.serve.queries import make_query
from kvatlas.serve.schema import ChatBody, TokenId, TokenizeBody, read_body
from kvatlas.tokens.prompts import TextPrompt
from kvatlas.types import Frame, MultimodalItem


def asked_of(limits: ApiSettings, prompt: kvatlas_pb2.PromptQuery) -> AskedPrompt:
    """Return what a message asks. Raises RequestError where it has no model, no prompt or two, or is beyond the limits."""
    query = make_query(
        limits,
        token_ids=array("I", prompt.token_ids),
        model=prompt.model,
        lora_name=prompt.lora_name,
        cache_salt=prompt.cache_salt,
        multimodal=[
            MultimodalItem(item.hash, item.offset_tokens, item.length_tokens if item.HasField("length_tokens") else None)
            for item in prompt.multimodal
        ],
        pods=list(prompt.pods) or None,
        scorer=prompt.scorer,
    )
    given = [name for name in ("text", "chat_json") if prompt.HasField(name)]
    if len(given) + bool(prompt.token_ids) > 1:
        raise RequestError(given[0], "the prompt is given twice", "send token_ids, text or chat_json, one of them")
    if not given:
        return AskedPrompt(query)
    tokenize = _tokenize_of(prompt.tokenize)
    if prompt.HasField("text"):
        return AskedPrompt(query, TextPrompt(model=prompt.model, text=prompt.text), tokenize, "text")
    chat = _chat_of(prompt.chat_json)
    if chat.cache_salt and chat.cache_salt != prompt.cache_salt:
        if prompt.cache_salt:
            raise RequestError("cache_salt", "another one is in chat_json", "send one of the two")
        query = msgspec.structs.replace(query, cache_salt=chat.cache_salt)
    return AskedPrompt(query, chat_prompt(prompt.model, chat), tokenize, "chat_json.")


def _chat_of(text: str) -> ChatBody:
    try:
        return read_body(text.encode(), ChatBody)
    except RequestError as error:
        field = "chat_json" if error.field == "body" else f"chat_json.{error.field}"
        raise RequestError(field, error.problem, error.remedy) from None


def _tokenize_of(options: kvatlas_pb2.TokenizeOptions) -> TokenizeBody:
    given = {
        "policy": options.policy or None,
        "budget_ms": options.budget_seconds * 1e3 if options.HasField("budget_seconds") else None,
        "on_failure": "unscored" if options.unscored_on_failure else "error",
    }
    try:
        return msgspec.convert(given, TokenizeBody)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        remedy = "policy: exact, stored or within; budget_seconds: above 0, at most 60"
        raise RequestError(f"tokenize.{place.rstrip('`')}", problem, remedy) from None


def asked_of_llmd(limits: ApiSettings, request: indexer_pb2.GetPodScoresRequest, *, text: bool) -> AskedPrompt:
    """Return what llm-d's message asks. ``text`` false: nobody can tokenize here, so the prompt must be a JSON array of ids."""
    tokens = [] if text else _token_ids(request.prompt)
    query = make_query(limits, token_ids=tokens, model=request.model_name, pods=list(request.pod_identifiers) or None)
    return AskedPrompt(query, TextPrompt(model=request.model_name, text=request.prompt) if text else None)


def _token_ids(prompt: str) -> list[int]:
    try:
        return msgspec.json.decode(prompt, type=list[TokenId])
    except msgspec.ValidationError as error:
        if prompt.lstrip().startswith("["):
            raise RequestError("prompt", f"{error}", "send a JSON array of token ids") from None
    except msgspec.DecodeError:
        pass
    remedy = (
        "configure tokens.directories, tokens.renderer or tokens.service, or send token ids as a JSON array, "
        "such as [1, 15043, 3186]"
    )
    raise TokenizationError(TokenizationReason.NO_BACKEND, "prompt", "is text, and no tokenizer is configured", remedy)


def tokens_message(info: TokensInfo | None) -> kvatlas_pb2.TokensInfo | None:
    if info is None:
        return None
    failure = info.failure
    return kvatlas_pb2.TokensInfo(
        source=info.source,
        tokenizer=info.tokenizer,
        revision=info.revision,
        exact=info.exact,
        complete=info.complete,
        count=info.count,
        from_store=info.from_store,
        failure=None if failure is None else kvatlas_pb2.TokensFailure(**msgspec.structs.asdict(failure)),
        estimated_count=info.estimated_count,
    )


def frame_of(request: kvatlas_pb2.PublishEventsRequest) -> Frame:
    """Return a frame as if it had been received now."""
    seq = request.seq if request.HasField("seq") else None
    return Frame(topic=request.topic, seq=seq, payload=request.payload, received_ns=time.time_ns())


def pod_message(pod: PodScore) -> kvatlas_pb2.PodPrefix:
    return kvatlas_pb2.PodPrefix(
        pod=pod.pod,
        model=pod.model,
        score=pod.score,
        matched_blocks=pod.matched_blocks,
        matched_tokens=pod.matched_tokens,
        predicted_cached_tokens=pod.predicted_cached_tokens,
        tiers={str(tier): count for tier, count in pod.tiers.items()},
        dp_rank=pod.dp_rank,
        predicted_by_rank={int(rank): tokens for rank, tokens in pod.predicted_by_rank.items()},
        speculative_blocks=pod.speculative_blocks,
        stale=pod.stale,
        stale_reason=None if pod.stale_reason is None else pod.stale_reason.value,
    )


def score_message(result: ScoreResult) -> kvatlas_pb2.ScoreResponse:
    return kvatlas_pb2.ScoreResponse(
        pods=map(pod_message, result.pods),
        scorer=result.scorer,
        prompt_tokens=result.prompt_tokens,
        blocks=result.blocks,
        cache_hits=result.cache_hits,
        coverage=result.coverage,
        tokens=tokens_message(result.tokens),
    )


def block_message(block: BlockLocality) -> kvatlas_pb2.BlockHolders:
    holders = (
        kvatlas_pb2.BlockHolder(
            pod=holder.pod,
            dp_rank=holder.dp_rank,
            tier=holder.tier,
            group=holder.group,
            copies=holder.copies,
            speculative=holder.speculative,
            stale=holder.stale,
        )
        for holder in block.holders
    )
    return kvatlas_pb2.BlockHolders(key=block.key, holders=holders)


def stream_message(status: PodStatus) -> kvatlas_pb2.StreamStatus:
    return kvatlas_pb2.StreamStatus(
        pod=status.pod,
        dp_rank=status.dp_rank,
        model=status.model,
        state=status.state,
        stale_reason=None if status.stale_reason is None else status.stale_reason.value,
        blocks=status.blocks,
        orphans=status.orphans,
        block_sizes_tokens=status.block_sizes_tokens,
        groups={int(group): kind for group, kind in status.groups.items()},
        next_seq=status.next_seq,
        queue_depth=status.queue_depth,
        gaps=status.gaps,
        replays=status.replays,
        restarts=status.restarts,
        last_event_age_seconds=status.last_event_age_s,
        source=status.source,
    )
