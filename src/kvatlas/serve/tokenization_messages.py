"""Messages of tokenization.TokenizationService as prompts, and tokens as its answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.proto.tokenization import tokenizer_pb2 as pb
from kvatlas.tokens.prompts import ChatPrompt, TextPrompt
from kvatlas.tokens.results import Tokenized

DEPTH_MAX = 64
"""Of values within values in a chat template's arguments."""


def completion_prompt(request: pb.RenderCompletionRequest) -> TextPrompt:
    """Return what is to be tokenized. Raises TokenizationError that names the field."""
    return TextPrompt(model=_model(request.model_name), text=request.prompt)


def text_prompt(request: pb.TokenizeRequest) -> TextPrompt:
    """Return what is to be tokenized. Raises TokenizationError that names the field."""
    return TextPrompt(model=_model(request.model_name), text=request.input, add_special_tokens=request.add_special_tokens)


def chat_prompt(request: pb.RenderChatCompletionRequest) -> ChatPrompt:
    """Return what is to be tokenized. Raises TokenizationError that names the field."""
    kwargs = _decoded("chat_template_kwargs", request.chat_template_kwargs, dict[str, Any])
    tools = _decoded("tools_json", request.tools_json, list[dict[str, Any]])
    return ChatPrompt(
        model=_model(request.model_name),
        messages=_messages("messages", request.messages),
        tools=tools or None,
        chat_template=request.chat_template or None,
        chat_template_kwargs=kwargs or None,
        add_generation_prompt=request.add_generation_prompt if request.HasField("add_generation_prompt") else True,
        continue_final_message=request.continue_final_message,
    )


def template_prompt(request: pb.ChatTemplateRequest) -> ChatPrompt:
    """Return the chat that is to become text. Raises TokenizationError that names the field."""
    if request.return_assistant_tokens_mask:
        raise TokenizationError(
            TokenizationReason.UNSUPPORTED, "return_assistant_tokens_mask", "a text has no tokens to mask", "leave it out"
        )
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(request.conversation_turns):
        messages += _messages(f"conversation_turns[{number}].messages", turn.messages)
    return ChatPrompt(
        model=_model(request.model_name),
        messages=messages,
        tools=[_fields("tools", tool.tool) for tool in request.tools] or None,
        documents=[_fields("documents", document.document) for document in request.documents] or None,
        chat_template=request.chat_template or None,
        chat_template_kwargs=_fields("chat_template_kwargs", request.chat_template_kwargs) or None,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
    )


def features_message(tokens: Tokenized) -> pb.MultiModalFeatures | None:
    """Return images, audio and videos of a prompt; None where there are none.

    Which of them an item is, is not known any more: all go under "image". A reader puts them back in order by offset.
    """
    if not tokens.multimodal:
        return None
    ranges = []
    for item in tokens.multimodal:
        if item.length_tokens is None:
            raise TokenizationError(
                TokenizationReason.UNSUPPORTED, "messages", "how long its images are is not told", "use a renderer of vLLM"
            )
        ranges.append(pb.PlaceholderRange(offset=item.offset_tokens, length=item.length_tokens))
    return pb.MultiModalFeatures(
        mm_hashes={"image": pb.StringList(values=[item.hash for item in tokens.multimodal])},
        mm_placeholders={"image": pb.PlaceholderRangeList(ranges=ranges)},
    )


def offset_pairs(before: int, ends: Sequence[int], after: int) -> list[int]:
    """Return start and end of each token, from where each ends. ``before``, ``after``: tokens put around the text.

    A token starts where the one before it ended; tokens that share a character (the bytes of an emoji) share its place.
    """
    pairs = [0] * (2 * before)
    start = end = 0
    for reached in ends:
        if reached != end:
            start, end = end, reached
        pairs += (start, end)
    return pairs + [0] * (2 * after)


def _messages(place: str, messages: Iterable[pb.ChatMessage]) -> list[dict[str, Any]]:
    return [_message(f"{place}[{number}]", message) for number, message in enumerate(messages)]


def _message(place: str, message: pb.ChatMessage) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role}
    if message.content_parts:
        made["content"] = [_part(f"{place}.content_parts[{number}]", part) for number, part in enumerate(message.content_parts)]
    elif message.HasField("content"):
        made["content"] = message.content
    if message.tool_calls_json:
        made["tool_calls"] = _decoded(f"{place}.tool_calls_json", message.tool_calls_json, list[dict[str, Any]])
    return made


def _part(place: str, part: pb.ContentPart) -> dict[str, Any]:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type == "image_url" and part.HasField("image_url"):
        return {"type": "image_url", "image_url": {"url": part.image_url.url}}
    raise TokenizationError(
        TokenizationReason.BAD_MESSAGES, place, f"{part.type!r:.40} with no such content", 'send "text" or "image_url"'
    )


def _decoded(field: str, text: str, kind: Any) -> Any:
    if not text:
        return None
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        form = "a JSON object" if kind == dict[str, Any] else "a JSON array of objects"
        raise TokenizationError(TokenizationReason.BAD_MESSAGES, field, str(error), f"send {form}") from None


def _fields(field: str, values: Mapping[str, pb.Value]) -> dict[str, Any]:
    return {name: _value(field, value, DEPTH_MAX) for name, value in values.items()}


def _value(field: str, value: pb.Value, depth: int) -> Any:
    if depth == 0:
        raise TokenizationError(
            TokenizationReason.BAD_MESSAGES, field, f"has values more than {DEPTH_MAX} deep", "send simpler ones"
        )
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() else number  # a template would print 3 as 3.0
    if kind == "list_value":
        return [_value(field, inner, depth - 1) for inner in value.list_value.values]
    if kind == "struct_value":
        return {name: _value(field, inner, depth - 1) for name, inner in value.struct_value.fields.items()}
    return value.string_value if kind == "string_value" else value.bool_value


def _model(name: str) -> str:
    if not name:
        raise TokenizationError(TokenizationReason.UNKNOWN_MODEL, "model_name", "is empty", "name a model")
    return name
