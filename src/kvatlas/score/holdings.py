"""A lookup turned around: what each stream holds of one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvatlas.score.weights import TierWeights
from kvatlas.types import GPU, BlockKey, GroupIdx, Lookup, Stream, StreamInfo, Tier

HeldTiers = Sequence[Tier | None]
"""By index block of the prompt: the best tier that holds it, or None."""


class Holdings:
    """Made in one pass over a lookup; then each stream costs only what it holds."""

    def __init__(self, lookup: Lookup, weights: TierWeights) -> None:
        self.keys: Sequence[BlockKey] = lookup.keys
        self.streams: Mapping[Stream, StreamInfo] = lookup.streams
        self.weights = weights
        self._held: dict[Stream, dict[GroupIdx, list[Tier | None]]] = {}
        self._promised: dict[Stream, set[int]] = {}
        self.blocks_held = 0
        """How many of the prompt's blocks at least one stream holds or was promised."""
        for i, (slots, promised) in enumerate(zip(lookup.holders, lookup.speculative, strict=True)):
            self.blocks_held += bool(slots or promised)
            for slot in slots:
                tiers = self._tiers(slot.stream, slot.group)
                best = tiers[i]
                if best is None or weights.rank(slot.tier) < weights.rank(best):
                    tiers[i] = slot.tier
            for stream in promised:
                self._promised.setdefault(stream, set()).add(i)

    def _tiers(self, stream: Stream, group: GroupIdx) -> list[Tier | None]:
        groups = self._held.setdefault(stream, {})
        if group not in groups:
            groups[group] = [None] * len(self.keys)
        return groups[group]

    def held(self, stream: Stream, group: GroupIdx) -> HeldTiers:
        """Return what one attention group holds. A promised block counts as held in GPU memory, in every group."""
        tiers = self._held.get(stream, {}).get(group) or [None] * len(self.keys)
        promised = self._promised.get(stream)
        if not promised:
            return tiers
        return [GPU if tier is None and i in promised else tier for i, tier in enumerate(tiers)]

    def held_anyhow(self, stream: Stream) -> list[float]:
        """Return the best tier weight of each block in any group; 0 where the stream has none."""
        best = [1.0 if i in self._promised.get(stream, ()) else 0.0 for i in range(len(self.keys))]
        for tiers in self._held.get(stream, {}).values():
            for i, tier in enumerate(tiers):
                if tier is not None:
                    best[i] = max(best[i], self.weights.of(tier))
        return best

    def promised_only(self, stream: Stream, blocks: int) -> int:
        """Return how many of the first ``blocks`` a stream was promised and has not confirmed."""
        return sum(1 for i in self._promised.get(stream, ()) if i < blocks)
