"""A chat as its template sees it: what vLLM 0.32 makes of an OpenAI chat before it renders it.

Follows ``ChatCompletionRequest`` (which requests are refused, and in what order keys come out) and ``renderers/chat_utils.py``.
Some rules are stricter than the engine's: ``strict`` and ``defer_loading`` of a tool are booleans (it also takes "yes" and the
like), ``tool_calls`` is a list (it also takes an empty object or string), and the text of a part is a text or missing (where
templates take parts, it lets other values through beside a proper part).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.local.chat_input import bad_message, in_order, kind_of

_log = logging.getLogger(__name__)

_TYPED_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
"""Roles whose content the engine reads as OpenAI defines it; other roles are taken too."""
_TEXT_KEYS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
"""Kinds of parts that are text, and the key that holds it."""
_TYPED_PARTS = frozenset({"text", "refusal", "thinking", "tool_reference"})
"""A list with none of these is refused in the typed roles; beside one of them the engine takes the others, too."""
_MEDIA = frozenset(
    {
        "image_url", "input_image", "image_embeds", "image_pil", "audio_url", "input_audio", "audio_embeds", "video_url",
        "video_embeds", "prompt_embeds",
    }
)  # fmt: skip
_PART_KEYS = _MEDIA - {"input_image", "prompt_embeds"} | {
    "closed", "data", "file", "name", "prompt_cache_breakpoint", "refusal", "text", "thinking", "type", "uuid",
}  # fmt: skip
"""Keys of parts that the engine knows. Others reach templates that take parts."""
_BILLING_HEADER = "x-anthropic-billing-header"
_PLAIN_ROLES = ("user", "assistant")


def conversation(messages: Sequence[Mapping[str, Any]], content_format: Literal["string", "openai"]) -> list[dict[str, Any]]:
    """Return the messages that a template sees. What was passed in stays as it is. Raises TokenizationError."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise bad_message("messages", kind_of(messages), "pass a list of messages")
    if not messages:
        raise bad_message("messages", "there are none", "pass one message at least")
    return [
        _plain_message(message, content_format) or _message(message, f"messages[{index}]", content_format)
        for index, message in enumerate(messages)
    ]


def with_developers_as_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation for a template that knows no developer role: one system message, first, has all they say."""
    if not any(message["role"] == "developer" for message in messages):
        return messages
    converted = [
        {**{key: value for key, value in message.items() if key != "tools"}, "role": "system"}
        if message["role"] == "developer"
        else message
        for message in messages
    ]
    if not any(message["role"] == "system" for message in converted[1:]):
        return converted
    said = [_plain(message["content"]) for message in converted if message["role"] == "system"]
    rest = [message for message in converted if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(text for text in said if text)}, *rest]


# --- one message


def _plain_message(message: Mapping[str, Any], content_format: Literal["string", "openai"]) -> dict[str, Any] | None:
    """Return a message that is a role and a text, as nearly all are; None for those that need a closer look."""
    if content_format != "string" or type(message) is not dict or len(message) != 2:
        return None
    role, content = message.get("role"), message.get("content")
    return {"role": role, "content": content} if role in _PLAIN_ROLES and type(content) is str else None


def _message(message: Mapping[str, Any], path: str, content_format: Literal["string", "openai"]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise bad_message(path, kind_of(message), "pass an object with role and content")
    role = message.get("role")
    if not isinstance(role, str):
        raise bad_message(f"{path}.role", "missing" if "role" not in message else kind_of(role), 'pass a text such as "user"')
    seen: dict[str, Any] = {"role": role, "content": _content(message, role, path, content_format)}
    if role == "assistant":
        _add_assistant(seen, message, path)
    elif role == "tool":
        _add_tool_answer(seen, message, path)
    name = message.get("name")
    if isinstance(name, str):
        seen["name"] = name
    elif "name" in message and role != "tool":
        raise bad_message(f"{path}.name", kind_of(name), "pass a text or leave it out")
    if isinstance(message.get("task"), str):
        seen["task"] = message["task"]
    if role == "developer":
        seen["tools"] = _developer_tools(message.get("tools"))
    return seen


def _add_assistant(seen: dict[str, Any], message: Mapping[str, Any], path: str) -> None:
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list | tuple):
            raise bad_message(f"{path}.tool_calls", kind_of(calls), "pass a list")
        if calls:
            seen["tool_calls"] = [_tool_call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(calls)]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        seen["reasoning"] = reasoning
        seen["reasoning_content"] = reasoning


def _add_tool_answer(seen: dict[str, Any], message: Mapping[str, Any], path: str) -> None:
    if "tool_call_id" in message:
        answered = message["tool_call_id"]
        if answered is not None and not isinstance(answered, str):
            raise bad_message(f"{path}.tool_call_id", kind_of(answered), "pass a text")
        seen["tool_call_id"] = answered
    content = seen["content"]
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        seen["content"] = "\n".join(part["text"] for part in content)


def _tool_call(call: Any, path: str) -> dict[str, Any]:
    """Return a call with its arguments as an object: templates want no JSON text. What is no object becomes an empty one."""
    if not isinstance(call, Mapping):
        raise bad_message(path, kind_of(call), "pass an object with id, type and function")
    if not isinstance(call.get("id"), str):
        raise bad_message(f"{path}.id", "missing" if "id" not in call else kind_of(call["id"]), "pass a text")
    if call.get("type") != "function":
        raise bad_message(f"{path}.type", repr(call.get("type")), 'the engine takes "function" only')
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise bad_message(f"{path}.function", kind_of(function), "pass an object with name and arguments")
    for key in ("name", "arguments"):
        if not isinstance(function.get(key), str):
            raise bad_message(f"{path}.function.{key}", kind_of(function.get(key)), "pass a text")
    parsed: Any = None
    if function["arguments"]:
        try:
            parsed = json.loads(function["arguments"])
        except json.JSONDecodeError:
            _log.debug("arguments of a tool call are no JSON: an empty object is taken, as in the engine")
        except (ValueError, RecursionError) as error:
            raise bad_message(f"{path}.function.arguments", str(error), "pass simpler JSON") from None
    ordered = {**function, "arguments": parsed if isinstance(parsed, dict) else {}}
    return in_order({**call, "function": in_order(ordered, ("arguments", "name"))}, ("id", "function", "type"))


def _developer_tools(tools: Any) -> Any:
    """Return a developer message's tools with keys in the engine's order; tools that are none pass as they are."""
    if not isinstance(tools, list):
        return tools
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function" or not isinstance(function.get("name"), str):
            return tools
    names = ("name", "description", "parameters", "strict")
    return [in_order({**tool, "function": in_order(tool["function"], names)}, ("function", "type")) for tool in tools]


# --- content


def _content(message: Mapping[str, Any], role: str, path: str, content_format: Literal["string", "openai"]) -> Any:
    content = message.get("content")
    parts: list[Any]
    if content is None:
        if "content" in message and not (role == "assistant" or (role == "function" and isinstance(message.get("name"), str))):
            raise bad_message(f"{path}.content", "null", "pass a text or a list of parts")
        parts = []
    elif isinstance(content, str):
        parts = [content]
    elif isinstance(content, list | tuple):
        parts = list(content)
    else:
        raise bad_message(f"{path}.content", kind_of(content), "pass a text or a list of parts")
    seen = []
    for index, part in enumerate(parts):
        where = f"{path}.content" if isinstance(content, str) else f"{path}.content[{index}]"
        seen.append(_part(part, role, where, keep_structure=content_format == "openai"))
    if isinstance(content, list | tuple) and parts and role in _TYPED_ROLES and not any(map(_is_typed, parts)):
        raise bad_message(f"{path}.content[0]", "no part that the engine knows", 'pass {"type": "text", "text": ...}')
    if content_format == "openai":
        return [part for part in seen if part is not None]
    return "\n".join(part for part in seen if part)


def _part(part: Any, role: str, path: str, *, keep_structure: bool) -> Any:
    """Return a part as a template gets it: an object where it takes parts, else a text; None where nothing remains."""
    if isinstance(part, str):
        text: str | None = _without_billing_header(part) if role == "system" else part
        if text is None or not keep_structure:
            return text
        return {"type": "text", "text": text}
    if not isinstance(part, Mapping):
        raise bad_message(path, kind_of(part), 'pass {"type": "text", "text": ...}')
    kind = part.get("type")
    _check_part(part, kind, path)
    assert isinstance(kind, str)
    if kind == "tool_reference":
        name = part.get("name")
        return {"type": "tool_reference", "name": name} if keep_structure else name
    text = part.get(_TEXT_KEYS[kind])
    if text is None and kind in ("text", "refusal"):
        return None
    if not isinstance(text, str):
        raise bad_message(f"{path}.{_TEXT_KEYS[kind]}", kind_of(text), "pass a text")
    if role == "system" and kind == "text":
        text = _without_billing_header(text)
    if text is None or not keep_structure:
        return text
    return {"type": "text", "text": text, **{key: value for key, value in part.items() if key not in _PART_KEYS}}


def _is_typed(part: Any) -> bool:
    if not isinstance(part, Mapping) or part.get("type") not in _TYPED_PARTS:
        return False
    return part["type"] == "tool_reference" or isinstance(part.get(_TEXT_KEYS[part["type"]]), str)


def _check_part(part: Mapping[str, Any], kind: Any, path: str) -> None:
    if (isinstance(kind, str) and kind in _MEDIA) or (
        (kind is None or part.get("uuid") is not None) and any(key in _MEDIA for key in part)
    ):
        raise TokenizationError(
            TokenizationReason.UNSUPPORTED,
            path,
            f"{kind or 'media'}: only the engine knows the tokens of what is no text",
            "set tokens.renderer.endpoints to a renderer (vllm launch render)",
        )
    if kind is None:
        raise bad_message(f"{path}.type", "missing", 'pass "text"')
    if not isinstance(kind, str) or (kind not in _TEXT_KEYS and kind != "tool_reference"):
        raise bad_message(
            f"{path}.type", repr(kind)[:60], 'the engine takes "text", "refusal", "thinking" and "tool_reference"'
        )
    if part.get("uuid") is not None:
        raise bad_message(f"{path}.uuid", "it names media, and there are none", "leave it out")
    if kind == "tool_reference" and "name" in part and not isinstance(part["name"], str):
        raise bad_message(f"{path}.name", kind_of(part["name"]), "pass a text")


def _without_billing_header(text: str) -> str | None:
    """Return a system text without the line that Claude Code puts first, which differs in each request; None: nothing else."""
    if not text.startswith(_BILLING_HEADER):
        return text
    return text.partition("\n")[2] or None


def _plain(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if "text" in part)
