"""What a template is given besides messages: tools, documents and arguments, as vLLM 0.32 merges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.local.chat_input import bad_message, kind_of
from kvatlas.tokens.prompts import ChatPrompt

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""What ``reasoning_effort`` can be."""
_OWN_ARGUMENTS = frozenset(
    {
        "chat_template", "max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
        "tokenizer_kwargs", "truncation",
    }
)  # fmt: skip
"""What ``apply_chat_template`` takes for itself: templates never see it."""


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
        raise bad_message("chat_template_kwargs", kind_of(given), "pass an object")
    if chat.add_generation_prompt and chat.continue_final_message:
        raise bad_message("continue_final_message", "add_generation_prompt is true as well", "set one of the two")
    tools = _tools(chat)
    merged: dict[str, Any] = {"tools": tools, **given}
    merged["add_generation_prompt"] = chat.add_generation_prompt
    merged["continue_final_message"] = chat.continue_final_message
    if chat.documents is not None:
        merged["documents"] = _documents(chat.documents)
    if chat.reasoning_effort is not None:
        if chat.reasoning_effort not in EFFORTS:
            raise bad_message("reasoning_effort", f"{chat.reasoning_effort!r}", f"allowed: {', '.join(EFFORTS)}")
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
    given = chat.chat_template_kwargs
    template = given.get("chat_template") if isinstance(given, Mapping) else None
    if template is None or template == "auto":
        return None
    if not isinstance(template, str):
        raise bad_message("chat_template_kwargs.chat_template", kind_of(template), "pass a text")
    return template


def _tools(chat: ChatPrompt) -> list[dict[str, Any]] | None:
    tools = chat.tools
    _check_tool_choice(chat)
    if tools is None:
        return None
    if isinstance(tools, str | bytes) or not isinstance(tools, Sequence):
        raise bad_message("tools", kind_of(tools), "pass a list")
    if not tools:
        raise bad_message("tools", "there are none", "pass one at least or leave it out")
    seen = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    if isinstance(chat.tool_choice, Mapping):
        chosen = chat.tool_choice["function"]["name"]
        if all(tool["function"]["name"] != chosen for tool in seen):
            raise bad_message("tool_choice.function.name", "none of the tools has this name", "choose one of them")
    return seen


def _check_tool_choice(chat: ChatPrompt) -> None:
    choice = chat.tool_choice
    if choice is None or choice == "none":
        return
    if chat.tools is None:
        raise bad_message("tool_choice", "there are no tools", "pass tools as well")
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise bad_message("tool_choice.function.name", "missing", 'pass {"type": "function", "function": {"name": ...}}')
        if choice.get("type", "function") != "function":
            raise bad_message("tool_choice.type", repr(choice["type"]), 'the engine takes "function" only')
    elif choice not in ("auto", "required"):
        raise bad_message("tool_choice", repr(choice)[:60], 'pass "none", "auto", "required" or a function')


def _tool(tool: Any, path: str) -> dict[str, Any]:
    """Return a tool with the keys that the engine knows, in its order, and null for what is not given."""
    if not isinstance(tool, Mapping):
        raise bad_message(path, kind_of(tool), "pass an object with type and function")
    if tool.get("type", "function") != "function":
        raise bad_message(f"{path}.type", repr(tool["type"]), 'the engine takes "function" only')
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise bad_message(f"{path}.function", "missing" if function is None else kind_of(function), "pass an object with name")
    seen: dict[str, Any] = {"name": function.get("name")}
    if not isinstance(seen["name"], str):
        raise bad_message(f"{path}.function.name", "missing" if seen["name"] is None else kind_of(seen["name"]), "pass a text")
    for key, wanted, kind in (("description", str, "a text"), ("parameters", Mapping, "an object")):
        seen[key] = function.get(key)
        if seen[key] is not None and not isinstance(seen[key], wanted):
            raise bad_message(f"{path}.function.{key}", kind_of(seen[key]), f"pass {kind}")
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
        raise bad_message(f"{path}.{key}", kind_of(flag), "pass true or false")
    return flag


def _documents(documents: Any) -> list[dict[str, str]]:
    if isinstance(documents, str | bytes) or not isinstance(documents, Sequence):
        raise bad_message("documents", kind_of(documents), "pass a list")
    for index, document in enumerate(documents):
        if not isinstance(document, Mapping):
            raise bad_message(f"documents[{index}]", kind_of(document), "pass an object of texts")
        for key, value in document.items():
            if not isinstance(value, str):
                raise bad_message(f"documents[{index}].{key}", kind_of(value), "pass a text")
    return [dict(document) for document in documents]


def _check_arguments(merged: Mapping[str, Any]) -> None:
    """Refuse arguments that fail in the engine, or that make it tokenize in another way."""
    for name in ("messages", "conversation", "self"):
        if name in merged:
            raise bad_message(f"chat_template_kwargs.{name}", "the name is taken", "choose another")
    if merged.get("return_assistant_tokens_mask"):
        raise bad_message("chat_template_kwargs.return_assistant_tokens_mask", "the engine can't", "leave it out")
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
            raise bad_message(f"chat_template_kwargs.{name}", kind_of(values), "pass a list of objects")
