"""What a block in a tier is worth next to one in GPU memory."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from kvatlas.types import CPU, DISK, GPU, STORAGE, Tier

DEFAULT_WEIGHTS: Mapping[Tier, float] = {GPU: 1.0, CPU: 0.8, DISK: 0.6, STORAGE: 0.5}


class TierWeights(msgspec.Struct, frozen=True):
    """Weights 0 to 1 by tier. A medium that nobody configured gets ``unknown``, never the GPU's weight."""

    by_tier: Mapping[Tier, float] = msgspec.field(default_factory=lambda: DEFAULT_WEIGHTS)
    unknown: float = 0.1

    def of(self, tier: Tier) -> float:
        return self.by_tier.get(tier, self.unknown)

    def rank(self, tier: Tier) -> tuple[float, Tier]:
        """Return the sort key from the best tier to the worst: by weight, equal ones by name."""
        return -self.of(tier), tier
