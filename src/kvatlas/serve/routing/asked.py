"""An engine's request as routing reads it: which model, which prompt, what its headers say. Knows no protocol, does no IO.

What engines would refuse is theirs to refuse: a body that is JSON and names a model is routed, at worst without a prompt to
match. Only what cannot be routed at all is refused here.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping
from typing import Any

import msgspec

from kvatlas.errors import RequestError, TokensError
from kvatlas.keys.tokens import as_token_array
from kvatlas.route.request import RouteRequest
from kvatlas.serve.prompts import chat_prompt, text_prompt
from kvatlas.serve.schema import ChatBody, CompletionBody, read_body
from kvatlas.tokens.prompts import Prompt
from kvatlas.tokens.tokenization import estimate

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
DESTINATION = "x-gateway-destination-endpoint"
REQUEST_ID = "x-request-id"
FAIRNESS_ID = "x-llm-d-inference-fairness-id"
OBJECTIVE = "x-llm-d-inference-objective"
MODEL_REWRITE = "x-llm-d-model-name-rewrite"
TTFT_SLO = "x-llm-d-slo-ttft-ms"
TPOT_SLO = "x-llm-d-slo-tpot-ms"
PREFILLER = "x-prefiller-host-port"
ENCODERS = "x-encoder-hosts-ports"
DP_RANK = "x-data-parallel-rank"

CONSUMED = frozenset(
    {
        *(DESTINATION, FAIRNESS_ID, OBJECTIVE, MODEL_REWRITE, TTFT_SLO, TPOT_SLO),
        *(PREFILLER, ENCODERS, DP_RANK, "x-kv-cache-source-host-port", "x-gateway-destination-endpoint-served"),
    }
)
"""Headers that are for the router or from it: a client's own are never passed on."""

ID_CHARS_MAX = 256
SLO_MS_MAX = 3_600_000


class Envelope(msgspec.Struct, frozen=True):
    """What is read of every body."""

    model: str
    stream: bool = False
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    cache_salt: str | None = None
    stream_options: dict[str, Any] | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One request, read."""

    path: str
    body: bytes
    """As it is to be sent on."""
    request: RouteRequest
    """Without the tokens of ``prompt``."""
    prompt: Prompt | None
    """What is to be tokenized; None where the tokens are given, or where there is nothing that could be."""
    stream: bool


def read_request(
    path: str, headers: Mapping[str, str], body: bytes, *, subset: frozenset[str] | None, priorities: Mapping[str, int]
) -> Asked:
    """Return a request. ``headers`` by lower-case name; ``priorities`` by objective.

    Raises RequestError (400): no JSON object, no model, a header that is none.
    """
    envelope = _envelope(body)
    model = envelope.model
    rewrite = headers.get(MODEL_REWRITE)
    if rewrite and rewrite != model:
        model, body = rewrite, _renamed(body, rewrite)
    prompt, token_ids, text = _prompt(path, model, body, envelope)
    estimated = 0 if prompt is None else estimate(prompt).tokens
    request = RouteRequest(
        id=request_id(headers),
        model=model,
        token_ids=token_ids,
        text=text,
        prompt_tokens_estimated=estimated or (0 if text is None else len(text) // 4),
        cache_salt=envelope.cache_salt,
        headers=headers,
        priority=priorities.get(headers.get(OBJECTIVE, ""), 0),
        fairness_id=headers.get(FAIRNESS_ID, "")[:ID_CHARS_MAX],
        ttft_slo_s=_milliseconds(headers, TTFT_SLO),
        tpot_slo_s=_milliseconds(headers, TPOT_SLO),
        subset=subset,
        if_cached=headers.get("prefer", "").strip().lower() == "if-available",
    )
    return Asked(path=path, body=body, request=request, prompt=prompt, stream=envelope.stream)


def request_id(headers: Mapping[str, str]) -> str:
    """Return a request's id; a new one where it has none."""
    return (headers.get(REQUEST_ID) or f"{random.getrandbits(128):032x}")[:ID_CHARS_MAX]


def _envelope(body: bytes) -> Envelope:
    try:
        envelope = msgspec.json.decode(body, type=Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # The rest may be odd, and is the engine's to judge; a model is what routing needs.
        envelope = Envelope(read_body(body, _Model).model)
    if not envelope.model:
        raise RequestError("model", "is empty", "name the model as the engines do")
    return envelope


class _Model(msgspec.Struct, frozen=True):
    model: str


def _renamed(body: bytes, model: str) -> bytes:
    """Return a body with another model's name, and everything else as it was."""
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({**fields, "model": model})


def _prompt(path: str, model: str, body: bytes, envelope: Envelope) -> tuple[Prompt | None, array[int] | None, str | None]:
    """Return what is to be tokenized, the tokens that are given, and the text for matching by history."""
    try:
        if path.endswith(CHAT) and envelope.messages:
            prompt = chat_prompt(model, msgspec.json.decode(body, type=ChatBody))
            return prompt, None, bytes(envelope.messages).decode()
        if path.endswith(COMPLETION) and envelope.prompt:
            return _completion(model, body, envelope)
        if envelope.input:  # embeddings, responses: what the engine makes of it is not known here
            return None, None, bytes(envelope.input).decode()
    except (msgspec.ValidationError, RequestError, TokensError, UnicodeDecodeError):
        return None, None, None  # the engine will say what is wrong with it
    return None, None, None


def _completion(model: str, body: bytes, envelope: Envelope) -> tuple[Prompt | None, array[int] | None, str | None]:
    """Of several prompts in one request the first is looked at."""
    prompt = msgspec.json.decode(envelope.prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list):
        return None, as_token_array(prompt), None
    if not isinstance(prompt, str):
        return None, None, None
    shape = msgspec.json.decode(body, type=_CompletionShape)
    completion = CompletionBody(prompt=prompt, **{name: getattr(shape, name) for name in shape.__struct_fields__})
    return text_prompt(model, prompt, completion), None, prompt


class _CompletionShape(msgspec.Struct, frozen=True):
    """What changes a completion's tokens besides its text."""

    add_special_tokens: bool = True
    max_tokens: int | None = 16
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None


def _milliseconds(headers: Mapping[str, str], name: str) -> float | None:
    """Return a header's time in seconds."""
    value = headers.get(name)
    if value is None:
        return None
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = -1.0
    if not 0 < milliseconds <= SLO_MS_MAX:
        raise RequestError(name, f"{value!r:.40} is no time", f"send milliseconds, above 0 and up to {SLO_MS_MAX}")
    return milliseconds / 1e3
