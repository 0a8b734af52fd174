"""What an engine's cache did, as vLLM 0.32 tells it: one payload a step, events as maps (``docs/events.md``)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

GPU = "GPU"


class KvEvents:
    """Collects a step's events. ``tiers``: the names of those below the GPU, as they are configured."""

    def __init__(self, block_size: int, tiers: Sequence[str] = ()) -> None:
        self._block_size = block_size
        self._media = (GPU, *(name.upper() for name in tiers))
        self._events: list[dict[str, Any]] = []

    def stored(self, tokens: array[int], keys: array[int], first: int, many: int, tier: int, salt: str | None) -> None:
        """Note that blocks ``first`` to ``first + many`` of a sequence are in a tier. ``keys``: of all its blocks."""
        size = self._block_size
        extra_keys: list[object] = [None] * many
        if salt and first == 0:
            extra_keys[0] = [salt]
        self._events.append(
            {
                "type": "BlockStored",
                "block_hashes": keys[first : first + many].tolist(),
                "parent_block_hash": keys[first - 1] if first else None,
                "token_ids": tokens[first * size : (first + many) * size].tolist(),
                "block_size": size,
                "lora_id": None,
                "medium": self._media[tier],
                "lora_name": None,
                "extra_keys": extra_keys,
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            }
        )

    def removed(self, tier: int, keys: Sequence[int]) -> None:
        """Note that blocks left a tier. As in vLLM, the GPU's are told one by one."""
        groups = [[key] for key in keys] if tier == 0 else [list(keys)]
        medium = self._media[tier]
        self._events += ({"type": "BlockRemoved", "block_hashes": group, "medium": medium, "group_idx": 0} for group in groups)

    def cleared(self) -> None:
        """Note that the GPU's blocks are all gone."""
        self._events.append({"type": "AllBlocksCleared"})

    def take(self, at_s: float) -> bytes | None:
        """Return what was noted since the last call, as a payload; None: nothing. ``at_s``: seconds since the epoch."""
        if not self._events:
            return None
        events, self._events = self._events, []
        return msgspec.msgpack.encode([at_s, events, 0])
