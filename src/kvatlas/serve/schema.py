"""JSON bodies of the HTTP API: what is asked, read strictly, and what is answered.

Results that need no change in JSON are those of :mod:`kvatlas.results`.
"""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from kvatlas.config import ApiSettings
from kvatlas.errors import RequestError
from kvatlas.keys.tokens import TOKEN_ID_MAX
from kvatlas.results import Holder, PodScore, PodStatus, Query
from kvatlas.serve.queries import TextError, make_query
from kvatlas.types import MultimodalItem

B = TypeVar("B", bound=msgspec.Struct)

TokenId = Annotated[int, Meta(ge=0, le=TOKEN_ID_MAX)]
KeyForm = Annotated[
    int | str,
    Meta(description='A block key: "0x" and hexadecimal digits, decimal digits in a string, or an integer below 2^64.'),
]
_Text = Annotated[str | None, Meta(description="The prompt as text: not supported in this version, send token_ids.")]
_Tokens = Annotated[list[TokenId] | None, Meta(description="The prompt's token ids, as the engine would see them.")]
_Pods = Annotated[list[str] | None, Meta(description="Only these pods; by default all.")]


class MalformedError(RequestError):
    """The body is no JSON at all."""


class MultimodalBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image, audio or video in a prompt."""

    hash: Annotated[str, Meta(description="Its content hash, as the engine computes it.", min_length=1)]
    offset_tokens: Annotated[int, Meta(description="Position of its first placeholder token.", ge=0)]


class PromptBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt, and for which pods."""

    model: Annotated[str, Meta(description="The served model's name.", min_length=1)]
    token_ids: _Tokens = None
    text: _Text = None
    lora_name: Annotated[str | None, Meta(description="The LoRA adapter's name.")] = None
    cache_salt: Annotated[str | None, Meta(description="The request's cache_salt.")] = None
    multimodal: list[MultimodalBody] = []
    pods: _Pods = None


class ScoreBody(PromptBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt to score pods for."""

    scorer: Annotated[str | None, Meta(description="A scorer's name; by default the configured one.")] = None


class CandidatesBody(ScoreBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt to find holders of."""

    limit: Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="At most this many pods.")] = None


class LocalityBody(PromptBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Block keys, or a prompt."""

    keys: Annotated[list[KeyForm] | None, Meta(description="Block keys; or else token_ids and model.")] = None
    model: Annotated[str, Meta(description="The served model's name; needed with token_ids.")] = ""


class BlockAnswer(msgspec.Struct, frozen=True):
    """Where one block lies."""

    key: Annotated[str, Meta(description="0x and 16 hexadecimal digits.")]
    holders: tuple[Holder, ...]


class LocalityAnswer(msgspec.Struct, frozen=True):
    """Where the blocks asked for lie, in their order."""

    blocks: tuple[BlockAnswer, ...]
    block_size_tokens: int


class CandidatesAnswer(msgspec.Struct, frozen=True):
    """Pods that hold a prefix of the prompt, best first."""

    pods: tuple[PodScore, ...]


class PodsAnswer(msgspec.Struct, frozen=True):
    """Every event stream: one data-parallel rank of a pod each."""

    pods: tuple[PodStatus, ...]


class ErrorDetail(msgspec.Struct, frozen=True):
    """What is wrong, and what to do."""

    field: str
    problem: str
    remedy: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    """Every answer that is not a success."""

    error: ErrorDetail


class HealthAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """State of the service."""

    status: str
    reason: str | None = None


def read_body(body: bytes, kind: type[B]) -> B:
    """Return a request from JSON. Raises MalformedError for what is no JSON, RequestError for what is no such request."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _request_error(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = "is empty" if not body else f"is no JSON: {error}"
        raise MalformedError("body", problem, "send one JSON object in UTF-8") from None


def prompt_query(limits: ApiSettings, body: PromptBody) -> Query:
    """Return the query in a body. Raises RequestError where there is no prompt, or it is text."""
    if body.token_ids is None:
        if body.text is not None:
            raise TextError("text", "tokenize it as the engine does and send token_ids")
        raise RequestError("token_ids", "is missing", "send the prompt's token ids")
    if body.text is not None:
        raise RequestError("text", "token_ids are given too", "send one of the two")
    return make_query(
        limits,
        token_ids=body.token_ids,
        model=body.model,
        lora_name=body.lora_name,
        cache_salt=body.cache_salt,
        multimodal=[MultimodalItem(item.hash, item.offset_tokens) for item in body.multimodal],
        pods=body.pods,
        scorer=body.scorer if isinstance(body, ScoreBody) else None,
    )


_UNKNOWN = re.compile(r"unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"missing required field `(.*)`", re.DOTALL)


def _request_error(message: str, kind: type[msgspec.Struct]) -> RequestError:
    problem, _, place = message.partition(" - at `$.")
    field = place.rstrip("`")
    at = f"{field}." if field else ""
    if found := _UNKNOWN.search(problem):
        struct = MultimodalBody if field.startswith("multimodal") else kind
        return RequestError(f"{at}{found[1][:80]}", "is no field here", f"fields: {', '.join(struct.__struct_fields__)}")
    if found := _MISSING.search(problem):
        return RequestError(f"{at}{found[1]}", "is missing", "add it")
    return RequestError(field or "body", problem[:1].lower() + problem[1:], "see /docs for the request's form")
