"""Errors about chats: what a value is instead of what it should be, and where a text is no Unicode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.prompts import ChatPrompt


def bad_message(field: str, problem: str, remedy: str) -> TokenizationError:
    return TokenizationError(TokenizationReason.BAD_MESSAGES, field, problem, remedy)


def kind_of(value: Any) -> str:
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


def in_order(value: Mapping[str, Any], first: tuple[str, ...]) -> dict[str, Any]:
    return {**{key: value[key] for key in first if key in value}, **value}


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
