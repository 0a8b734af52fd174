"""Which blocks of a prompt an image, audio or video touches: engines and llm-d hash it into each of them."""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas.errors import RequestError
from kvatlas.types import MultimodalItem


def items_by_block(
    items: Sequence[MultimodalItem], block_size_tokens: int, blocks: int
) -> dict[int, list[tuple[MultimodalItem, int]]]:
    """Return the items that overlap each block that has any, in their order, with their offset from the block's start.

    Raises RequestError for an item without a length, and for items that overlap: in no engine's prompt do they.
    """
    found: dict[int, list[tuple[MultimodalItem, int]]] = {}
    reached_tokens = 0
    for position, item in sorted(enumerate(items), key=lambda numbered: numbered[1].offset_tokens):
        field = f"multimodal[{position}]"
        if item.length_tokens is None:
            remedy = "send how many placeholder tokens it has: keys.mode needs it"
            raise RequestError(f"{field}.length_tokens", "is missing", remedy)
        end = item.offset_tokens + item.length_tokens
        if item.offset_tokens < reached_tokens or item.length_tokens < 0:
            remedy = "send where each item's placeholder tokens begin, and how many they are"
            raise RequestError(f"{field}.offset_tokens", "the item overlaps the one before it", remedy)
        reached_tokens = end
        if end == item.offset_tokens:
            continue
        last = min(blocks - 1, (end - 1) // block_size_tokens)
        for block in range(item.offset_tokens // block_size_tokens, last + 1):
            found.setdefault(block, []).append((item, item.offset_tokens - block * block_size_tokens))
    return found
