"""What of a prompt the simpler remotes cannot express; images, audio and videos as remotes tell them: checked, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from kvatlas.tokens.prompts import ChatPrompt, Prompt
from kvatlas.types import MultimodalItem

HASH_CHARS_MAX = 1024


def multimodal_items(
    hashes: Mapping[str, Sequence[str]], ranges: Mapping[str, Sequence[tuple[int, int]]], prompt_tokens: int
) -> tuple[MultimodalItem, ...]:
    """Return the items by offset, from hashes and (offset, length) by modality. Raises ValueError where the two don't fit."""
    if set(hashes) != set(ranges):
        raise ValueError("hashes and placeholders name different modalities")
    items = []
    for modality, names in hashes.items():
        places = ranges[modality]
        if len(names) != len(places):
            raise ValueError(f"{len(names)} hashes of {modality!r:.40} and {len(places)} placeholders")
        for name, (offset, length) in zip(names, places, strict=True):
            if not 0 < len(name) <= HASH_CHARS_MAX:
                raise ValueError(f"a hash of {len(name)} characters")
            if offset < 0 or length < 1 or offset + length > prompt_tokens:
                raise ValueError(f"a placeholder at {offset}, {length} long, in a prompt of {prompt_tokens} tokens")
            items.append(MultimodalItem(name, offset, length))
    items.sort(key=lambda item: item.offset_tokens)
    for before, after in pairwise(items):
        if before.offset_tokens + (before.length_tokens or 0) > after.offset_tokens:
            raise ValueError(f"placeholders overlap at {after.offset_tokens}")
    return tuple(items)


def field_beyond(chat: ChatPrompt) -> str | None:
    """Return a chat's field that neither /tokenize nor the tokenization service knows as the engine does; None without any."""
    beyond = {
        "documents": chat.documents is not None,
        "reasoning_effort": chat.reasoning_effort is not None,
        "tools": chat.tools is not None and not chat.tools,  # the engine refuses an empty list; /tokenize takes it
        "tool_choice": chat.tool_choice not in ((None, "auto") if chat.tools else (None, "none")),
    }
    return next((name for name, found in beyond.items() if found), None)


def media_field(prompt: Prompt) -> str | None:
    """Return where a chat has a content that is not text, as ``messages[0].content[1]``; None where all is text."""
    if not isinstance(prompt, ChatPrompt):
        return None
    for number, message in enumerate(prompt.messages):
        content = message.get("content")
        if not isinstance(content, Sequence) or isinstance(content, str):
            continue
        for position, part in enumerate(content):
            if not isinstance(part, str) and not (isinstance(part, Mapping) and part.get("type") == "text"):
                return f"messages[{number}].content[{position}]"
    return None
