"""What is asked of an engine: bodies of OpenAI's API as vLLM takes them, read and checked. No IO."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from kvatlas.errors import RequestError
from kvatlas.keys.tokens import as_token_array
from kvatlas.serve.prompts import chat_prompt, text_prompt
from kvatlas.serve.schema import ChatBody, CompletionBody, read_body
from kvatlas.tokens.prompts import Prompt

COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"

COMPLETION_TOKENS = 16
"""A completion's tokens where it does not say: OpenAI's default."""

_Tokens = Annotated[int, Meta(ge=1)] | None


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class _Fields(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of every body. What changes nothing here (temperature, say) is passed over."""

    model: str | None = None
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    max_tokens: _Tokens = None
    max_completion_tokens: _Tokens = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    return_token_ids: bool | None = False
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    n: int | None = 1
    best_of: int | None = 1
    echo: bool | None = False
    logprobs: bool | int | None = None
    prompt_logprobs: int | None = None
    suffix: str | None = None
    use_beam_search: bool | None = False


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One request."""

    model: str | None
    prompt: Prompt | None
    """What is to be tokenized; None where ``token_ids`` are given."""
    token_ids: array[int]
    output_tokens: int | None
    """None: the engine's own choice."""
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    cache_salt: str | None = None


def read_generation(path: str, model: str, body: bytes) -> Asked:
    """Return what is asked of ``/v1/completions`` or ``/v1/chat/completions``.

    RequestError names what is wrong, or what an embedded engine cannot do.
    """
    fields = read_body(body, _Fields)
    _check_supported(fields)
    prompt, token_ids = (_chat if path.startswith(CHAT) else _completion)(model, body, fields)
    output = fields.max_completion_tokens if path.startswith(CHAT) else None
    output = output or fields.max_tokens
    return Asked(
        model=fields.model,
        prompt=prompt,
        token_ids=token_ids,
        output_tokens=output if path.startswith(CHAT) else output or COMPLETION_TOKENS,
        stream=bool(fields.stream),
        include_usage=fields.stream_options is not None and fields.stream_options.include_usage,
        return_token_ids=bool(fields.return_token_ids),
        cache_salt=fields.cache_salt,
    )


def read_tokenize(model: str, body: bytes) -> Asked:
    """Return what is asked of ``/tokenize``: a chat, or else a text."""
    fields = read_body(body, _Fields)
    prompt, token_ids = (_chat if fields.messages else _completion)(model, body, fields)
    return Asked(model=fields.model, prompt=prompt, token_ids=token_ids, output_tokens=None)


class _Detokenize(msgspec.Struct, frozen=True):
    tokens: list[Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]]
    model: str | None = None


def read_detokenize(body: bytes) -> array[int]:
    """Return the tokens that ``/detokenize`` is asked about."""
    return array("I", read_body(body, _Detokenize).tokens)


def _chat(model: str, body: bytes, fields: _Fields) -> tuple[Prompt, array[int]]:
    if not fields.messages:
        raise RequestError("messages", "is missing", "send a list of messages")
    return chat_prompt(model, read_body(body, ChatBody)), array("I")


def _completion(model: str, body: bytes, fields: _Fields) -> tuple[Prompt | None, array[int]]:
    if not fields.prompt:
        raise RequestError("prompt", "is missing", "send a text or token ids")
    prompt = msgspec.json.decode(fields.prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise RequestError("prompt", f"holds {len(prompt)} prompts", "send one: embedded engines take no batches")
        prompt = prompt[0]
    if isinstance(prompt, list):
        return None, as_token_array(prompt)
    if not isinstance(prompt, str):
        raise RequestError("prompt", f"is of type {type(prompt).__name__}", "send a text or token ids")
    shape = read_body(body, _TextShape)
    return text_prompt(model, prompt, CompletionBody(prompt=prompt, add_special_tokens=shape.add_special_tokens)), array("I")


class _TextShape(msgspec.Struct, frozen=True):
    add_special_tokens: bool = True


def _check_supported(fields: _Fields) -> None:
    plain: Mapping[str, tuple[object, ...]] = {
        "n": (1, None),
        "best_of": (1, None),
        "echo": (False, None),
        "logprobs": (False, None),
        "prompt_logprobs": (None,),
        "suffix": (None, ""),
        "use_beam_search": (False, None),
    }
    for name, values in plain.items():
        value = getattr(fields, name)
        if not any(value is one or (value == one and type(value) is type(one)) for one in values):
            raise RequestError(name, f"{value!r} is nothing that an embedded engine can do", "leave it out")
