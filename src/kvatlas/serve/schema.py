"""JSON bodies of the HTTP API: what is asked, read strictly, and what is answered.

Results that need no change in JSON are those of :mod:`kvatlas.results`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from kvatlas.errors import RequestError
from kvatlas.keys.tokens import TOKEN_ID_MAX
from kvatlas.results import Holder, PodScore, PodStatus, TokensInfo

B = TypeVar("B", bound=msgspec.Struct)

TokenId = Annotated[int, Meta(ge=0, le=TOKEN_ID_MAX)]
KeyForm = Annotated[
    int | str,
    Meta(description='A block key: "0x" and hexadecimal digits, decimal digits in a string, or an integer below 2^64.'),
]
_Text = Annotated[str | None, Meta(description="The prompt as text, as in a completion request.")]
_Tokens = Annotated[list[TokenId] | None, Meta(description="The prompt's token ids, as the engine would see them.")]
_Truncate = Annotated[
    Annotated[int, Meta(ge=-1)] | None, Meta(description="How many prompt tokens to keep; -1: as many as the model takes.")
]
_Side = Annotated[
    Literal["left", "right"] | None, Meta(description="Where a prompt is cut off; by default as the engine does.")
]
_Salt = Annotated[str | None, Meta(description="The request's cache_salt.")]
_Pods = Annotated[list[str] | None, Meta(description="Only these pods; by default all.")]


class MalformedError(RequestError):
    """The body is no JSON at all."""


class MultimodalBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image, audio or video in a prompt."""

    hash: Annotated[str, Meta(description="Its content hash, as the engine computes it.", min_length=1)]
    offset_tokens: Annotated[int, Meta(description="Position of its first placeholder token.", ge=0)]
    length_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="Its placeholder tokens; needed where keys.mode is not kvatlas.")
    ] = None


class CompletionBody(msgspec.Struct, frozen=True, kw_only=True):
    """A completion request as engines take it. Fields that do not change its tokens are passed over."""

    prompt: Annotated[str | list[TokenId], Meta(description="Text, or token ids.")]
    add_special_tokens: Annotated[bool, Meta(description="Add what the tokenizer puts around a text, such as BOS.")] = True
    max_tokens: Annotated[int, Meta(ge=0, description="Tokens to generate: truncation leaves room for one.")] | None = 16
    truncate_prompt_tokens: _Truncate = None
    truncation_side: _Side = None
    cache_salt: _Salt = None


class _ChatFields(msgspec.Struct, frozen=True, kw_only=True):
    """What changes the tokens of a chat, besides its messages."""

    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: Annotated[
        str | None, Meta(description="A template instead of the model's own; needs tokens.trustRequestTemplate.")
    ] = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    reasoning_effort: str | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=0)] | None = None
    truncate_prompt_tokens: _Truncate = None
    truncation_side: _Side = None
    cache_salt: _Salt = None


class ChatBody(_ChatFields, frozen=True, kw_only=True):
    """A chat completion request as engines take it. Fields that do not change its tokens are passed over."""

    messages: list[dict[str, Any]]


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to come by the tokens of a text or chat."""

    policy: Annotated[
        Literal["exact", "stored", "within"] | None, Meta(description="Which tokens to wait for; by default tokens.policy.")
    ] = None
    budget_ms: Annotated[
        Annotated[float, Meta(gt=0, le=60_000)] | None,
        Meta(description="How long the policy within waits; by default tokens.budget."),
    ] = None
    on_failure: Annotated[
        Literal["error", "unscored"],
        Meta(description="Where there are no tokens: an error, or all pods of the model without a score, and why."),
    ] = "error"


class PromptBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt (token_ids, text, completion or chat: one of them), and for which pods."""

    model: Annotated[str, Meta(description="The served model's name.", min_length=1)]
    token_ids: _Tokens = None
    text: _Text = None
    completion: Annotated[
        CompletionBody | None, Meta(description="A completion request: prompt, truncate_prompt_tokens...")
    ] = None
    chat: Annotated[ChatBody | None, Meta(description="A chat completion request.")] = None
    tokenize: TokenizeBody = TokenizeBody()
    lora_name: Annotated[str | None, Meta(description="The LoRA adapter's name.")] = None
    cache_salt: _Salt = None
    multimodal: Annotated[list[MultimodalBody], Meta(description="Items in token_ids; those of a chat are found.")] = []
    pods: _Pods = None


class ScoreBody(PromptBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt to score pods for."""

    scorer: Annotated[str | None, Meta(description="A scorer's name; by default the configured one.")] = None


class CandidatesBody(ScoreBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt to find holders of."""

    limit: Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="At most this many pods.")] = None


class LocalityBody(PromptBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Block keys, or a prompt."""

    keys: Annotated[list[KeyForm] | None, Meta(description="Block keys; or else a prompt and model.")] = None
    model: Annotated[str, Meta(description="The served model's name; needed with a prompt.")] = ""


class LlmdCompletionBody(CompletionBody, frozen=True, kw_only=True):
    """What llm-d's example takes at /score_completions: a completion request whose prompt is text."""

    model: Annotated[str, Meta(min_length=1)]
    prompt: Annotated[str, Meta(min_length=1)]


class LlmdChatBody(_ChatFields, frozen=True, kw_only=True):
    """What llm-d's example takes at /score_chat_completions: a chat completion request."""

    model: Annotated[str, Meta(min_length=1)]
    messages: list[dict[str, Any]] | None = None
    conversation: Annotated[list[dict[str, Any]] | None, Meta(description="The same as messages.")] = None


class BlockAnswer(msgspec.Struct, frozen=True):
    """Where one block lies."""

    key: Annotated[str, Meta(description="0x and 16 hexadecimal digits.")]
    holders: tuple[Holder, ...]


class LocalityAnswer(msgspec.Struct, frozen=True):
    """Where the blocks asked for lie, in their order."""

    blocks: tuple[BlockAnswer, ...]
    block_size_tokens: int
    tokens: TokensInfo | None = None
    """Of a prompt that came as text or chat."""


class CandidatesAnswer(msgspec.Struct, frozen=True):
    """Pods that hold a prefix of the prompt, best first."""

    pods: tuple[PodScore, ...]
    tokens: TokensInfo | None = None
    """Of a prompt that came as text or chat."""


class PodsAnswer(msgspec.Struct, frozen=True):
    """Every event stream: one data-parallel rank of a pod each."""

    pods: tuple[PodStatus, ...]


class ErrorDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is wrong, and what to do."""

    field: str
    problem: str
    remedy: str
    reason: Annotated[str | None, Meta(description="Why there are no tokens, in one word; absent in other errors.")] = None


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
        if _LONE_SURROGATE.search(body):
            problem += " (perhaps an escape such as \\ud83d without its other half)"
        raise MalformedError("body", problem, "send one JSON object in UTF-8") from None


_LONE_SURROGATE = re.compile(rb"\\\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\\\u[dD][c-fC-F])")
_ALLOWED = {
    "policy": "one of: exact, stored, within",
    "on_failure": "one of: error, unscored",
    "truncation_side": "one of: left, right",
}
"""By field, where a value is none of a few."""
_UNKNOWN = re.compile(r"unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"missing required field `(.*)`", re.DOTALL)


def _request_error(message: str, kind: type[msgspec.Struct]) -> RequestError:
    problem, _, place = message.partition(" - at `$.")
    field = place.rstrip("`")
    at = f"{field}." if field else ""
    if found := _UNKNOWN.search(problem):
        struct = MultimodalBody if field.startswith("multimodal") else TokenizeBody if field == "tokenize" else kind
        return RequestError(f"{at}{found[1][:80]}", "is no field here", f"fields: {', '.join(struct.__struct_fields__)}")
    if found := _MISSING.search(problem):
        return RequestError(f"{at}{found[1]}", "is missing", "add it")
    remedy = _ALLOWED.get(field.rpartition(".")[2], "see /docs for the request's form")
    return RequestError(field or "body", problem[:1].lower() + problem[1:], remedy)
