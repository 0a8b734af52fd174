"""Prompts as messages of tokenization.TokenizationService, where these can express them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.proto.tokenization import tokenizer_pb2 as pb
from kvatlas.tokens.prompts import ChatPrompt, Prompt
from kvatlas.tokens.remote.features import field_beyond, multimodal_items
from kvatlas.types import MultimodalItem


def chat_request(chat: ChatPrompt) -> pb.RenderChatCompletionRequest:
    """Return a chat as the service's message. Raises TokenizationError (unsupported) that names what it can't express."""
    beyond = field_beyond(chat)
    if beyond is not None:
        raise _unsupported(beyond)
    if chat.add_special_tokens:
        raise _unsupported("add_special_tokens")
    if chat.chat_template == "":
        raise _unsupported("chat_template")
    return pb.RenderChatCompletionRequest(
        model_name=chat.model,
        messages=[_message(f"messages[{number}]", message) for number, message in enumerate(chat.messages)],
        tools_json=_json("tools", chat.tools),
        chat_template=chat.chat_template or "",
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        chat_template_kwargs=_json("chat_template_kwargs", chat.chat_template_kwargs),
    )


def check_truncation(prompt: Prompt) -> None:
    """Raise TokenizationError where a prompt cannot be cut here as the engine would cut it: with neither side nor number."""
    cut = prompt.truncation
    if cut is None:
        return
    if cut.tokens < 0:
        raise _unsupported("truncate_prompt_tokens")  # how many the model takes is not told
    if cut.side is None:
        raise _unsupported("truncation_side")  # what the tokenizer does by default is not told


def features_of(answer: pb.RenderChatCompletionResponse) -> tuple[MultimodalItem, ...]:
    """Return images, audio and videos of an answer. Raises ValueError where they don't fit the tokens."""
    features = answer.features
    ranges = {
        modality: [(place.offset, place.length) for place in places.ranges]
        for modality, places in features.mm_placeholders.items()
    }
    hashes = {modality: list(names.values) for modality, names in features.mm_hashes.items()}
    return multimodal_items(hashes, ranges, len(answer.token_ids))


def _message(place: str, message: Mapping[str, Any]) -> pb.ChatMessage:
    for name, value in message.items():
        if name not in ("role", "content", "tool_calls") and value is not None:
            raise _unsupported(f"{place}.{name}")
    role = message.get("role")
    if not isinstance(role, str):
        raise _bad(f"{place}.role", "is no text", "name who speaks: system, user, assistant or tool")
    made = pb.ChatMessage(
        role=_text(f"{place}.role", role), tool_calls_json=_json(f"{place}.tool_calls", message.get("tool_calls"))
    )
    content = message.get("content")
    if isinstance(content, str):
        made.content = _text(f"{place}.content", content)
    elif isinstance(content, Sequence) and content:
        made.content_parts.extend(_part(f"{place}.content[{number}]", part) for number, part in enumerate(content))
    elif content is not None:
        raise _unsupported(f"{place}.content")
    return made


def _part(place: str, part: object) -> pb.ContentPart:
    if isinstance(part, Mapping):
        kind = part.get("type")
        value = part.get(kind) if isinstance(kind, str) else None
        if kind == "text" and isinstance(value, str) and part.keys() == {"type", "text"}:
            return pb.ContentPart(type=kind, text=_text(place, value))
        if kind == "image_url" and isinstance(value, Mapping) and part.keys() == {"type", "image_url"}:
            url = value.get("url")
            if isinstance(url, str) and value.keys() <= {"url", "detail"}:  # the engine does not look at detail
                return pb.ContentPart(type=kind, image_url=pb.ImageUrl(url=_text(place, url)))
    raise _unsupported(place)


def _json(field: str, value: object) -> str | None:
    if value is None:
        return None
    try:
        return msgspec.json.encode(value, enc_hook=dict).decode()
    except UnicodeEncodeError:
        raise _no_unicode(field) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise _bad(field, f"is no JSON: {error}", "send JSON values") from None


def _text(field: str, text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _no_unicode(field) from None
    return text


def checked_text(text: str) -> str:
    """Return a completion's prompt. Raises TokenizationError where it is no Unicode text."""
    return _text("prompt", text)


def _bad(field: str, problem: str, remedy: str) -> TokenizationError:
    return TokenizationError(TokenizationReason.BAD_MESSAGES, field, problem, remedy)


def _no_unicode(field: str) -> TokenizationError:
    return TokenizationError(
        TokenizationReason.BAD_TEXT, field, "a lone surrogate is no Unicode text", "send text in valid UTF-8"
    )


def _unsupported(field: str) -> TokenizationError:
    return TokenizationError(
        TokenizationReason.UNSUPPORTED,
        field,
        "the tokenization service's messages cannot express it",
        "use a renderer (tokens.renderer), or a tokenizer here (tokens.directories)",
    )
