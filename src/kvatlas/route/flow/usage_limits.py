"""Up to which saturation requests of a priority are dispatched.

Source: llm-d-router, ``plugins/flowcontrol/usagelimits``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Protocol, runtime_checkable

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.plugins import NoParameters, Services


@runtime_checkable
class UsageLimitPolicy(Protocol):
    """Gives each priority a ceiling."""

    def ceilings(self, saturation: float, priorities: Sequence[int]) -> Sequence[float]:
        """Return one ceiling a priority, none above the one before it. ``priorities``: those in use, highest first."""
        ...


class StaticUsageLimit:
    """The same ceiling for all."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        threshold: Annotated[float, msgspec.Meta(gt=0)] = 1.0

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self.name = name
        self._threshold = parameters.threshold

    def ceilings(self, saturation: float, priorities: Sequence[int]) -> Sequence[float]:
        return [self._threshold] * len(priorities)


class PriorityHoldback:
    """Lower priorities stop earlier, so that room is kept for higher ones. A priority that is alone has the highest ceiling.

    ``rank``: in equal steps, whatever the numbers; ``value``: in proportion to them.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        min_ceiling: Annotated[float, msgspec.Meta(ge=0, lt=1)]
        max_ceiling: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
        shape: Literal["linear"] = "linear"
        domain: Literal["rank", "value"] = "rank"

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        if parameters.min_ceiling >= parameters.max_ceiling:
            raise ConfigError(f"{name}.minCeiling", "is not below maxCeiling", f"less than {parameters.max_ceiling:g}")
        self.name = name
        self._low, self._high = parameters.min_ceiling, parameters.max_ceiling
        self._by_rank = parameters.domain == "rank"

    def ceilings(self, saturation: float, priorities: Sequence[int]) -> Sequence[float]:
        if len(priorities) < 2:
            return [self._high] * len(priorities)
        spread = self._high - self._low
        if self._by_rank:
            return [self._high - rank * spread / (len(priorities) - 1) for rank in range(len(priorities))]
        least, span = priorities[-1], priorities[0] - priorities[-1]
        return [self._low + (priority - least) / span * spread for priority in priorities]


class SoftReflectiveCeiling:
    """Lower priorities stop earlier the busier the pool is, and then go in a share of all turns instead of none.

    The ceiling of the priority of rank i among n is ``1 - i * saturation / (n - 1)``. Below theirs priorities are open. At or
    above it they are open in one of ``round(saturation / (1 - saturation))`` looks, all of them in the same.
    """

    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        self.name = name
        self._looks = 0
        """While somebody was at or above the ceiling."""

    def ceilings(self, saturation: float, priorities: Sequence[int]) -> Sequence[float]:
        lower = len(priorities) - 1
        beyond = 0.0
        if 0.5 <= saturation < 1.0 and lower > 0:  # the lowest priority is at its ceiling
            self._looks += 1
            beyond = 1.0 if self._looks % math.floor(saturation / (1.0 - saturation) + 0.5) == 0 else 0.0
        return [1.0 if rank == 0 or saturation < 1.0 - rank * saturation / lower else beyond for rank in range(len(priorities))]
