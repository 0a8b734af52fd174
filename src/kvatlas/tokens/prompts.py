"""What is to become tokens: a text or a chat, with all that its tokens depend on. Names are those of OpenAI and vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec


class Truncation(msgspec.Struct, frozen=True):
    """How a long prompt is cut. ``tokens``: how many to keep (``truncate_prompt_tokens``), -1: as many as the model takes.

    ``side``: where it is cut off, ``left`` (the last tokens stay) or ``right``; None: as the engine does by default.
    """

    tokens: int
    side: Literal["left", "right"] | None = None


class TextPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt of a completion. ``add_special_tokens``: what the tokenizer puts around a text, such as BOS."""

    model: str
    text: str
    add_special_tokens: bool = True
    truncation: Truncation | None = None
    max_output_tokens: int = 0
    """Tokens that the request asks for: a truncation to what the model takes leaves room for one where it asks for any."""


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt of a chat completion: messages that the model's template turns into text."""

    model: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    """A template instead of the model's own; refused unless tokens.trustRequestTemplate."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    reasoning_effort: str | None = None
    truncation: Truncation | None = None
    max_output_tokens: int = 0


Prompt: TypeAlias = TextPrompt | ChatPrompt
