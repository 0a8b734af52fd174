"""A prefix cache as engines have it: whole blocks, least recently used first out, every change told as vLLM tells it."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec
import xxhash


class Served(msgspec.Struct, frozen=True):
    """What one prompt did to the cache."""

    cached_tokens: int
    events: tuple[dict[str, Any], ...]
    """In vLLM's form; none where nothing was stored or removed."""


class BlockCache:
    """Holds up to ``blocks_max`` blocks of ``block_size`` tokens. A prompt's last token is never served from it."""

    def __init__(self, block_size: int = 16, blocks_max: int = 4096) -> None:
        self.block_size = block_size
        self.blocks_max = blocks_max
        self._held: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def cached_tokens(self, prompt: Sequence[int]) -> int:
        """Return what the engine would report for a prompt now."""
        return self._hit(self._hashes(prompt), prompt) * self.block_size

    def serve(self, prompt: Sequence[int]) -> Served:
        """Look a prompt up and keep its whole blocks, those at its beginning longest."""
        all_hashes = self._hashes(prompt)
        hit = self._hit(all_hashes, prompt)
        hashes = all_hashes[: self.blocks_max]
        # What is held has no gaps: of two blocks of a prompt the first one was used last. So what is new is the end.
        first_new = next((i for i, digest in enumerate(hashes) if digest not in self._held), len(hashes))
        for digest in reversed(hashes):
            self._held[digest] = None
            self._held.move_to_end(digest)
        removed = [self._held.popitem(last=False)[0] for _ in range(len(self._held) - self.blocks_max)]
        events: list[dict[str, Any]] = []
        if removed:
            events.append({"type": "BlockRemoved", "block_hashes": removed, "medium": "GPU", "group_idx": 0})
        if first_new < len(hashes):
            events.append(self._stored(hashes, first_new, prompt))
        return Served(hit * self.block_size, tuple(events))

    def clear(self) -> tuple[dict[str, Any], ...]:
        """Drop everything, as a reset of the prefix cache does."""
        self._held.clear()
        return ({"type": "AllBlocksCleared"},)

    def _stored(self, hashes: list[int], first: int, prompt: Sequence[int]) -> dict[str, Any]:
        return {
            "type": "BlockStored",
            "block_hashes": hashes[first:],
            "parent_block_hash": hashes[first - 1] if first else None,
            "token_ids": list(prompt[first * self.block_size : len(hashes) * self.block_size]),
            "block_size": self.block_size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [None] * (len(hashes) - first),
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }

    def _hit(self, hashes: list[int], prompt: Sequence[int]) -> int:
        usable = max(0, len(prompt) - 1) // self.block_size
        return next((i for i, digest in enumerate(hashes[:usable]) if digest not in self._held), min(usable, len(hashes)))

    def _hashes(self, prompt: Sequence[int]) -> list[int]:
        size, digest, hashes = self.block_size, 0, []
        data = struct.pack(f"<{len(prompt)}I", *prompt)
        for start in range(0, len(prompt) // size * size * 4, size * 4):
            digest = xxhash.xxh64_intdigest(data[start : start + size * 4], digest)
            hashes.append(digest)
        return hashes
