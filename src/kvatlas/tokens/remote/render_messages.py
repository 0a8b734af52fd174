"""What is sent to vLLM's render endpoints and to /tokenize, and what comes back. Names and rules are those of vLLM 0.32."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt
from kvatlas.tokens.remote.features import field_beyond, media_field, multimodal_items
from kvatlas.types import MultimodalItem

TokenId = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]

CHAT_RENDER = "/v1/chat/completions/render"
TEXT_RENDER = "/v1/completions/render"
TOKENIZE = "/tokenize"


class _Placeholder(msgspec.Struct, frozen=True):
    offset: int
    length: int


class _Features(msgspec.Struct, frozen=True):
    mm_hashes: dict[str, list[str]]
    mm_placeholders: dict[str, list[_Placeholder]]


class _Rendered(msgspec.Struct, frozen=True):
    token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1)]
    features: _Features | None = None
    cache_salt: str | None = None


class _Tokenized(msgspec.Struct, frozen=True):
    tokens: list[TokenId]
    count: int
    max_model_len: int


class _Refusal(msgspec.Struct, frozen=True):
    message: str
    type: str = ""
    param: str | None = None


class _RefusalBody(msgspec.Struct, frozen=True):
    error: _Refusal | str


_chat_decoder = msgspec.json.Decoder(_Rendered)
_text_decoder = msgspec.json.Decoder(Annotated[list[_Rendered], msgspec.Meta(min_length=1, max_length=1)])
_tokenized_decoder = msgspec.json.Decoder(_Tokenized)
_refusal_decoder = msgspec.json.Decoder(_RefusalBody)


class RenderedPrompt(msgspec.Struct, frozen=True):
    """A prompt's tokens with its images, audio and videos."""

    token_ids: array[int]
    multimodal: tuple[MultimodalItem, ...] = ()


def render_request(prompt: Prompt) -> tuple[str, bytes]:
    """Return path and body that ask a render endpoint for a prompt. Raises TokenizationError for what is no JSON."""
    fields: dict[str, Any] = {**_shared_fields(prompt), "mm_payload": "none"}  # images' hashes and places, not their pixels
    if isinstance(prompt, TextPrompt) or prompt.max_output_tokens:
        fields["max_tokens"] = 1  # where any are asked for, truncation to what the model takes (-1) leaves room for one
    if prompt.truncation is not None:
        fields["truncate_prompt_tokens"] = prompt.truncation.tokens
        if prompt.truncation.side is not None:
            fields["truncation_side"] = prompt.truncation.side
    if isinstance(prompt, TextPrompt):
        return TEXT_RENDER, _encoded(fields)
    for name in ("tool_choice", "documents", "reasoning_effort"):
        value = getattr(prompt, name)
        if value is not None:
            fields[name] = value
    return CHAT_RENDER, _encoded(fields)


def tokenize_request(prompt: Prompt) -> tuple[str, bytes]:
    """Return path and body that ask /tokenize. Only for prompts that :func:`beyond_tokenize` finds nothing in."""
    return TOKENIZE, _encoded(_shared_fields(prompt))


def _shared_fields(prompt: Prompt) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": prompt.model, "add_special_tokens": prompt.add_special_tokens}
    if isinstance(prompt, TextPrompt):
        return {**fields, "prompt": prompt.text}
    fields |= {
        "messages": prompt.messages,
        "add_generation_prompt": prompt.add_generation_prompt,
        "continue_final_message": prompt.continue_final_message,
    }
    for name in ("tools", "chat_template", "chat_template_kwargs"):
        value = getattr(prompt, name)
        if value is not None:
            fields[name] = value
    return fields


def beyond_tokenize(prompt: Prompt) -> str | None:
    """Return the field for which /tokenize may give other tokens than the engine uses; None where it gives the same.

    It knows neither truncation nor tool_choice, documents and reasoning_effort, tells no images' hashes, and leaves out what
    chat completions do to messages first: reasoning_content is renamed, and Mistral's tool calls are rewritten. For gpt-oss it
    uses the template, where chat completions use Harmony; that is seen by the model's name alone.
    """
    if prompt.truncation is not None:
        return "truncate_prompt_tokens"
    if isinstance(prompt, TextPrompt):
        return None
    beyond = field_beyond(prompt)
    if beyond is None and "gpt-oss" in prompt.model.lower().replace("_", "-"):
        return "model"
    return beyond or _beyond_in_messages(prompt)


def _beyond_in_messages(chat: ChatPrompt) -> str | None:
    for number, message in enumerate(chat.messages):
        for name in ("tool_calls", "tool_call_id", "reasoning_content"):
            if message.get(name) is not None:
                return f"messages[{number}].{name}"
    return media_field(chat)


def read_rendered(prompt: Prompt, body: bytes) -> RenderedPrompt:
    """Return what a render endpoint answered. Raises ValueError where it is no such answer."""
    if isinstance(prompt, TextPrompt):
        (rendered,) = _text_decoder.decode(body)
    else:
        rendered = _chat_decoder.decode(body)
    features = rendered.features
    if features is None:
        return RenderedPrompt(array("I", rendered.token_ids))
    ranges = {
        modality: [(place.offset, place.length) for place in places] for modality, places in features.mm_placeholders.items()
    }
    items = multimodal_items(features.mm_hashes, ranges, len(rendered.token_ids))
    return RenderedPrompt(array("I", rendered.token_ids), items)


def read_tokenized(prompt: Prompt, body: bytes) -> RenderedPrompt:
    """Return what /tokenize answered. ValueError where that is none; TokenizationError where the engine would refuse."""
    found = _tokenized_decoder.decode(body)
    if found.count != len(found.tokens):
        raise ValueError(f"count is {found.count}, and there are {len(found.tokens)} tokens")
    field = "prompt" if isinstance(prompt, TextPrompt) else "messages"
    if not found.tokens or (isinstance(prompt, TextPrompt) and not prompt.text):
        raise TokenizationError(TokenizationReason.REFUSED, field, "has no tokens", "send a prompt that has some")
    if found.count >= found.max_model_len:  # /tokenize has no such bound; the engine needs room for one token more
        raise TokenizationError(
            TokenizationReason.TOO_MANY_TOKENS,
            field,
            f"{found.count} tokens leave no room for an answer in the {found.max_model_len} of the model",
            "send less",
        )
    return RenderedPrompt(array("I", found.tokens))


class Refusal(msgspec.Struct, frozen=True):
    """An error answer in vLLM's form. ``field``: which field it is about; None where it does not say."""

    message: str
    kind: str
    field: str | None


def read_refusal(body: bytes) -> Refusal | None:
    """Return what vLLM says about a request that it refuses; None where the answer is none of its own."""
    try:
        error = _refusal_decoder.decode(body).error
    except (ValueError, RecursionError):
        return None
    if isinstance(error, str):
        return Refusal(error, "", None)
    field = error.param.removeprefix("body.") if error.param else None
    return Refusal(error.message, error.type, field)


def _encoded(fields: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(fields, enc_hook=_plain)
    except UnicodeEncodeError:
        raise TokenizationError(
            TokenizationReason.BAD_TEXT, "prompt", "a lone surrogate is no Unicode text", "send text in valid UTF-8"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenizationError(
            TokenizationReason.BAD_MESSAGES, "messages", f"are no JSON: {error}", "send JSON values"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")
