"""Between protobuf messages and our values."""

from __future__ import annotations

import time
from array import array

import msgspec

from kvatlas.config import ApiSettings
from kvatlas.errors import RequestError
from kvatlas.proto.indexer.v1 import indexer_pb2
from kvatlas.proto.kvatlas.v1 import kvatlas_pb2
from kvatlas.results import BlockLocality, PodScore, PodStatus, Query, ScoreResult
from kvatlas.serve.queries import TextError, make_query
from kvatlas.serve.schema import TokenId
from kvatlas.types import Frame, MultimodalItem


def query_of(limits: ApiSettings, prompt: kvatlas_pb2.PromptQuery) -> Query:
    """Return the query in a message. Raises RequestError where it is beyond the limits or has no model."""
    return make_query(
        limits,
        token_ids=array("I", prompt.token_ids),
        model=prompt.model,
        lora_name=prompt.lora_name,
        cache_salt=prompt.cache_salt,
        multimodal=[MultimodalItem(item.hash, item.offset_tokens) for item in prompt.multimodal],
        pods=list(prompt.pods) or None,
        scorer=prompt.scorer,
    )


def query_of_llmd(limits: ApiSettings, request: indexer_pb2.GetPodScoresRequest) -> Query:
    """Return the query in llm-d's message, whose prompt must be a JSON array of token ids. Raises TextError for text."""
    try:
        tokens = msgspec.json.decode(request.prompt, type=list[TokenId])
    except msgspec.ValidationError as error:
        if request.prompt.lstrip().startswith("["):
            raise RequestError("prompt", f"{error}", "send a JSON array of token ids") from None
        raise _text() from None
    except msgspec.DecodeError:
        raise _text() from None
    return make_query(limits, token_ids=tokens, model=request.model_name, pods=list(request.pod_identifiers) or None)


def _text() -> TextError:
    return TextError("prompt", "send the prompt's token ids as a JSON array, such as [1, 15043, 3186]")


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
