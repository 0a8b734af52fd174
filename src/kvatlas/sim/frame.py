"""What a step did to an engine's cache, as the engine publishes it: a vLLM payload, events as arrays (``docs/events.md``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvatlas.sim.engines import EngineSpec, Job


class Frame:
    """Collects events until they are published. Removals that follow each other in one tier become one event."""

    def __init__(self, spec: EngineSpec) -> None:
        self._block_size_tokens = spec.block_size_tokens
        self._media = ("GPU", *(tier.name for tier in spec.tiers))
        self._events: list[list[Any]] = []
        self._removed: list[int] = []
        self._removed_from = 0

    def stored(self, job: Job, first: int, many: int, tier: int) -> None:
        """Note that a job's blocks are in a tier (0: the GPU)."""
        self._end_removal()
        keys, size = job.keys, self._block_size_tokens
        hashes, tokens = keys[first : first + many].tolist(), job.tokens[first * size : (first + many) * size].tolist()
        parent = keys[first - 1] if first else None
        self._events.append(["BlockStored", hashes, parent, tokens, size, None, self._media[tier]])

    def removed(self, keys: Sequence[int], tier: int) -> None:
        """Note that keys are not in a tier any more."""
        if self._removed_from != tier:
            self._end_removal()
            self._removed_from = tier
        self._removed += keys

    def take(self, at_s: float) -> bytes | None:
        """Return all events since the last time as a payload; None: there were none. ``at_s``: virtual seconds."""
        self._end_removal()
        if not self._events:
            return None
        events, self._events = self._events, []
        return msgspec.msgpack.encode([at_s, events])

    def _end_removal(self) -> None:
        if self._removed:
            self._events.append(["BlockRemoved", self._removed, self._media[self._removed_from]])
            self._removed = []
