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
from kvatlas.tokens.prompts import ChatPrompt

_log = logging.getLogger(__name__)

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
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
_OWN_ARGUMENTS = frozenset(
    {
        "chat_template", "max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
        "tokenizer_kwargs", "truncation",
    }
)  # fmt: skip
"""What ``apply_chat_template`` takes for itself: templates never see it."""


_PLAIN_ROLES = ("user", "assistant")


def conversation(messages: Sequence[Mapping[str, Any]], content_format: Literal["string", "openai"]) -> list[dict[str, Any]]:
    """Return the messages that a template sees. What was passed in stays as it is. Raises TokenizationError."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise _bad("messages", _kind(messages), "pass a list of messages")
    if not messages:
        raise _bad("messages", "there are none", "pass one message at least")
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


def arguments(chat: ChatPrompt) -> dict[str, Any]:
    """Return what a template is given besides messages, as the engine merges it. Raises TokenizationError.

    Fields of the request come before ``chat_template_kwargs``; only tools can be replaced there. A value of None or "auto" is
    as good as none. With ``tool_choice`` "none" templates see tools nevertheless, unless the engine runs with
    --exclude-tools-when-tool-choice-none.
    """
    given = chat.chat_template_kwargs
    if given is None:
        given = {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise _bad("chat_template_kwargs", _kind(given), "pass an object")
    if chat.add_generation_prompt and chat.continue_final_message:
        raise _bad("continue_final_message", "add_generation_prompt is true as well", "set one of the two")
    tools = _tools(chat)
    merged: dict[str, Any] = {"tools": tools, **given}
    merged["add_generation_prompt"] = chat.add_generation_prompt
    merged["continue_final_message"] = chat.continue_final_message
    if chat.documents is not None:
        merged["documents"] = _documents(chat.documents)
    if chat.reasoning_effort is not None:
        if chat.reasoning_effort not in _EFFORTS:
            raise _bad("reasoning_effort", f"{chat.reasoning_effort!r}", f"allowed: {', '.join(_EFFORTS)}")
        merged["reasoning_effort"] = chat.reasoning_effort
        merged.setdefault("enable_thinking", chat.reasoning_effort != "none")
    kept = {key: value for key, value in merged.items() if value is not None and value != "auto"}
    if tools is not None:
        kept.setdefault("tools", tools)
    _check_arguments(kept)
    for own in _OWN_ARGUMENTS:
        kept.pop(own, None)
    return {"tools": None, "documents": None, **kept}


def template_argument(chat: ChatPrompt) -> str | None:
    """Return the template that ``chat_template_kwargs`` names, which the engine takes like ``chat_template``."""
    template = (chat.chat_template_kwargs or {}).get("chat_template")
    if template is None or template == "auto":
        return None
    if not isinstance(template, str):
        raise _bad("chat_template_kwargs.chat_template", _kind(template), "pass a text")
    return template


def check_text(text: str, chat: ChatPrompt | None = None) -> None:
    """Raise BAD_TEXT for a text with half of a surrogate pair, and name where in the chat it is."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        path = "prompt" if chat is None else _surrogate_path(chat)
        problem = "half of a surrogate pair" + (f" at character {error.start}" if chat is None else "")
        raise TokenizationError(TokenizationReason.BAD_TEXT, path, problem, "pass Unicode text") from None


# --- one message


def _plain_message(message: Mapping[str, Any], content_format: Literal["string", "openai"]) -> dict[str, Any] | None:
    """Return a message that is a role and a text, as nearly all are; None for those that need a closer look."""
    if content_format != "string" or type(message) is not dict or len(message) != 2:
        return None
    role, content = message.get("role"), message.get("content")
    return {"role": role, "content": content} if role in _PLAIN_ROLES and type(content) is str else None


def _message(message: Mapping[str, Any], path: str, content_format: Literal["string", "openai"]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _bad(path, _kind(message), "pass an object with role and content")
    role = message.get("role")
    if not isinstance(role, str):
        raise _bad(f"{path}.role", "missing" if "role" not in message else _kind(role), 'pass a text such as "user"')
    seen: dict[str, Any] = {"role": role, "content": _content(message, role, path, content_format)}
    if role == "assistant":
        _add_assistant(seen, message, path)
    elif role == "tool":
        _add_tool_answer(seen, message, path)
    name = message.get("name")
    if isinstance(name, str):
        seen["name"] = name
    elif "name" in message and role != "tool":
        raise _bad(f"{path}.name", _kind(name), "pass a text or leave it out")
    if isinstance(message.get("task"), str):
        seen["task"] = message["task"]
    if role == "developer":
        seen["tools"] = _developer_tools(message.get("tools"))
    return seen


def _add_assistant(seen: dict[str, Any], message: Mapping[str, Any], path: str) -> None:
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list | tuple):
            raise _bad(f"{path}.tool_calls", _kind(calls), "pass a list")
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
            raise _bad(f"{path}.tool_call_id", _kind(answered), "pass a text")
        seen["tool_call_id"] = answered
    content = seen["content"]
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        seen["content"] = "\n".join(part["text"] for part in content)


def _tool_call(call: Any, path: str) -> dict[str, Any]:
    """Return a call with its arguments as an object: templates want no JSON text. What is no object becomes an empty one."""
    if not isinstance(call, Mapping):
        raise _bad(path, _kind(call), "pass an object with id, type and function")
    if not isinstance(call.get("id"), str):
        raise _bad(f"{path}.id", "missing" if "id" not in call else _kind(call["id"]), "pass a text")
    if call.get("type") != "function":
        raise _bad(f"{path}.type", repr(call.get("type")), 'the engine takes "function" only')
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise _bad(f"{path}.function", _kind(function), "pass an object with name and arguments")
    for key in ("name", "arguments"):
        if not isinstance(function.get(key), str):
            raise _bad(f"{path}.function.{key}", _kind(function.get(key)), "pass a text")
    parsed: Any = None
    if function["arguments"]:
        try:
            parsed = json.loads(function["arguments"])
        except json.JSONDecodeError:
            _log.debug("arguments of a tool call are no JSON: an empty object is taken, as in the engine")
        except (ValueError, RecursionError) as error:
            raise _bad(f"{path}.function.arguments", str(error), "pass simpler JSON") from None
    ordered = {**function, "arguments": parsed if isinstance(parsed, dict) else {}}
    return _in_order({**call, "function": _in_order(ordered, ("arguments", "name"))}, ("id", "function", "type"))


def _developer_tools(tools: Any) -> Any:
    """Return a developer message's tools with keys in the engine's order; tools that are none pass as they are."""
    if not isinstance(tools, list):
        return tools
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function" or not isinstance(function.get("name"), str):
            return tools
    names = ("name", "description", "parameters", "strict")
    return [_in_order({**tool, "function": _in_order(tool["function"], names)}, ("function", "type")) for tool in tools]


def _in_order(value: Mapping[str, Any], first: tuple[str, ...]) -> dict[str, Any]:
    return {**{key: value[key] for key in first if key in value}, **value}


# --- content


def _content(message: Mapping[str, Any], role: str, path: str, content_format: Literal["string", "openai"]) -> Any:
    content = message.get("content")
    parts: list[Any]
    if content is None:
        if "content" in message and not (role == "assistant" or (role == "function" and isinstance(message.get("name"), str))):
            raise _bad(f"{path}.content", "null", "pass a text or a list of parts")
        parts = []
    elif isinstance(content, str):
        parts = [content]
    elif isinstance(content, list | tuple):
        parts = list(content)
    else:
        raise _bad(f"{path}.content", _kind(content), "pass a text or a list of parts")
    seen = []
    for index, part in enumerate(parts):
        where = f"{path}.content" if isinstance(content, str) else f"{path}.content[{index}]"
        seen.append(_part(part, role, where, keep_structure=content_format == "openai"))
    if isinstance(content, list | tuple) and parts and role in _TYPED_ROLES and not any(map(_is_typed, parts)):
        raise _bad(f"{path}.content[0]", "no part that the engine knows", 'pass {"type": "text", "text": ...}')
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
        raise _bad(path, _kind(part), 'pass {"type": "text", "text": ...}')
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
        raise _bad(f"{path}.{_TEXT_KEYS[kind]}", _kind(text), "pass a text")
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
        raise _bad(f"{path}.type", "missing", 'pass "text"')
    if not isinstance(kind, str) or (kind not in _TEXT_KEYS and kind != "tool_reference"):
        raise _bad(f"{path}.type", repr(kind)[:60], 'the engine takes "text", "refusal", "thinking" and "tool_reference"')
    if part.get("uuid") is not None:
        raise _bad(f"{path}.uuid", "it names media, and there are none", "leave it out")
    if kind == "tool_reference" and "name" in part and not isinstance(part["name"], str):
        raise _bad(f"{path}.name", _kind(part["name"]), "pass a text")


def _without_billing_header(text: str) -> str | None:
    """Return a system text without the line that Claude Code puts first, which differs in each request; None: nothing else."""
    if not text.startswith(_BILLING_HEADER):
        return text
    return text.partition("\n")[2] or None


def _plain(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if "text" in part)


# --- tools, documents and the rest


def _tools(chat: ChatPrompt) -> list[dict[str, Any]] | None:
    tools = chat.tools
    _check_tool_choice(chat)
    if tools is None:
        return None
    if isinstance(tools, str | bytes) or not isinstance(tools, Sequence):
        raise _bad("tools", _kind(tools), "pass a list")
    if not tools:
        raise _bad("tools", "there are none", "pass one at least or leave it out")
    seen = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    if isinstance(chat.tool_choice, Mapping):
        chosen = chat.tool_choice["function"]["name"]
        if all(tool["function"]["name"] != chosen for tool in seen):
            raise _bad("tool_choice.function.name", "none of the tools has this name", "choose one of them")
    return seen


def _check_tool_choice(chat: ChatPrompt) -> None:
    choice = chat.tool_choice
    if choice is None or choice == "none":
        return
    if chat.tools is None:
        raise _bad("tool_choice", "there are no tools", "pass tools as well")
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise _bad("tool_choice.function.name", "missing", 'pass {"type": "function", "function": {"name": ...}}')
        if choice.get("type", "function") != "function":
            raise _bad("tool_choice.type", repr(choice["type"]), 'the engine takes "function" only')
    elif choice not in ("auto", "required"):
        raise _bad("tool_choice", repr(choice)[:60], 'pass "none", "auto", "required" or a function')


def _tool(tool: Any, path: str) -> dict[str, Any]:
    """Return a tool with the keys that the engine knows, in its order, and null for what is not given."""
    if not isinstance(tool, Mapping):
        raise _bad(path, _kind(tool), "pass an object with type and function")
    if tool.get("type", "function") != "function":
        raise _bad(f"{path}.type", repr(tool["type"]), 'the engine takes "function" only')
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise _bad(f"{path}.function", "missing" if function is None else _kind(function), "pass an object with name")
    seen: dict[str, Any] = {"name": function.get("name")}
    if not isinstance(seen["name"], str):
        raise _bad(f"{path}.function.name", "missing" if seen["name"] is None else _kind(seen["name"]), "pass a text")
    for key, wanted, kind in (("description", str, "a text"), ("parameters", Mapping, "an object")):
        seen[key] = function.get(key)
        if seen[key] is not None and not isinstance(seen[key], wanted):
            raise _bad(f"{path}.function.{key}", _kind(seen[key]), f"pass {kind}")
    outer = _flag(tool, "defer_loading", path)
    strict = _flag(function, "strict", f"{path}.function")
    deferred = _flag(function, "defer_loading", f"{path}.function")
    if strict is not None:
        seen["strict"] = strict
    if deferred is not None or outer is not None:
        seen["defer_loading"] = deferred if deferred is not None else outer
    whole: dict[str, Any] = {"type": "function", "function": seen}
    if outer is not None:
        whole["defer_loading"] = outer
    return whole


def _flag(value: Mapping[str, Any], key: str, path: str) -> bool | None:
    flag = value.get(key)
    if flag is not None and not isinstance(flag, bool):
        raise _bad(f"{path}.{key}", _kind(flag), "pass true or false")
    return flag


def _documents(documents: Any) -> list[dict[str, str]]:
    if isinstance(documents, str | bytes) or not isinstance(documents, Sequence):
        raise _bad("documents", _kind(documents), "pass a list")
    for index, document in enumerate(documents):
        if not isinstance(document, Mapping):
            raise _bad(f"documents[{index}]", _kind(document), "pass an object of texts")
        for key, value in document.items():
            if not isinstance(value, str):
                raise _bad(f"documents[{index}].{key}", _kind(value), "pass a text")
    return [dict(document) for document in documents]


def _check_arguments(merged: Mapping[str, Any]) -> None:
    """Refuse arguments that fail in the engine, or that make it tokenize in another way."""
    for name in ("messages", "conversation", "self"):
        if name in merged:
            raise _bad(f"chat_template_kwargs.{name}", "the name is taken", "choose another")
    if merged.get("return_assistant_tokens_mask"):
        raise _bad("chat_template_kwargs.return_assistant_tokens_mask", "the engine can't", "leave it out")
    if merged.get("tokenize"):
        raise TokenizationError(
            TokenizationReason.UNSUPPORTED,
            "chat_template_kwargs.tokenize",
            "templates are rendered as text here",
            "leave it out, or set tokens.renderer.endpoints",
        )
    for name in ("tools", "documents"):
        values = merged.get(name)
        if values is not None and not (isinstance(values, list) and all(isinstance(value, dict) for value in values)):
            raise _bad(f"chat_template_kwargs.{name}", _kind(values), "pass a list of objects")


def _surrogate_path(chat: ChatPrompt) -> str:
    for name in ("messages", "tools", "documents", "chat_template_kwargs", "chat_template"):
        path = _find_surrogate(getattr(chat, name), name)
        if path is not None:
            return path
    return "messages"


def _find_surrogate(value: Any, path: str) -> str | None:
    if isinstance(value, str):
        return path if any("\ud800" <= character <= "\udfff" for character in value) else None
    found = None
    if isinstance(value, Mapping):
        for key, inner in value.items():
            found = found or _find_surrogate(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            found = found or _find_surrogate(inner, f"{path}[{index}]")
    return found


def _kind(value: Any) -> str:
    """Return what a value is, in JSON's words."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        bytes: "bytes",
        list: "a list",
        tuple: "a list",
    }
    return names.get(type(value), "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}")


def _bad(field: str, problem: str, remedy: str) -> TokenizationError:
    return TokenizationError(TokenizationReason.BAD_MESSAGES, field, problem, remedy)
