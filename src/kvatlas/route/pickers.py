"""Pickers: who gets the request once all are scored. ``spread-picker`` is ours, the others are llm-d's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.plugins import Services


class PickerParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """What all pickers take."""

    max_num_of_endpoints: int = 1
    """How many are picked; further ones are for retries. 0 and less: one, as in llm-d."""

    @property
    def count(self) -> int:
        return max(1, self.max_num_of_endpoints)


class MaxScorePicker:
    """The highest totals. Equal ones are drawn, so that ties spread. Source: llm-d-router, max-score-picker."""

    Parameters = PickerParameters

    def __init__(self, name: str, parameters: PickerParameters, services: Services) -> None:
        self._count = parameters.count

    def pick(self, cycle: Cycle, candidates: Sequence[Candidate], totals: Sequence[float]) -> list[Candidate]:
        if self._count == 1:
            best = max(totals)
            if totals.count(best) == 1:
                return [candidates[totals.index(best)]]
        order = _shuffled(cycle, len(candidates))
        order.sort(key=lambda position: -totals[position])  # stable: equal totals stay shuffled
        return [candidates[position] for position in order[: self._count]]


class RandomPicker:
    """Anybody, whatever the totals say. Source: llm-d-router, random-picker."""

    Parameters = PickerParameters

    def __init__(self, name: str, parameters: PickerParameters, services: Services) -> None:
        self._count = parameters.count

    def pick(self, cycle: Cycle, candidates: Sequence[Candidate], totals: Sequence[float]) -> list[Candidate]:
        return [candidates[position] for position in _shuffled(cycle, len(candidates))[: self._count]]


class WeightedRandomPicker:
    """Drawn without return, as likely as their totals; totals of 0 and less come last. All of them such: anybody.

    The keys U^(1/total) are compared by their logarithms, which tiny totals do not round to 0.
    Source: llm-d-router, weighted-random-picker; Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006).
    """

    Parameters = PickerParameters

    def __init__(self, name: str, parameters: PickerParameters, services: Services) -> None:
        self._count = parameters.count

    def pick(self, cycle: Cycle, candidates: Sequence[Candidate], totals: Sequence[float]) -> list[Candidate]:
        def key(total: float) -> float:
            return math.log(1.0 - cycle.random.random()) / total if total > 0 else -math.inf

        keys = [key(total) for total in totals]
        order = sorted(_shuffled(cycle, len(candidates)), key=lambda position: -keys[position])
        return [candidates[position] for position in order[: self._count]]


class SpreadPicker:
    """The highest totals, where those within ``near_tie`` of the best one count as equal: of them whoever has least in flight.

    A total far below a near tie is never preferred, however idle its endpoint is. Equal in flight too: drawn.
    """

    class Parameters(PickerParameters, frozen=True, forbid_unknown_fields=True, rename="camel"):
        near_tie: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
        """Share of the best total: 0.05 takes totals of 95% of it and more as equal."""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self._count = parameters.count
        self._near_tie = parameters.near_tie

    def pick(self, cycle: Cycle, candidates: Sequence[Candidate], totals: Sequence[float]) -> list[Candidate]:
        best = max(totals)
        least = best - abs(best) * self._near_tie

        def rank(position: int) -> tuple[float, int]:
            near = totals[position] >= least
            return (-best, candidates[position].load.in_flight.requests) if near else (-totals[position], 0)

        order = sorted(_shuffled(cycle, len(candidates)), key=rank)
        return [candidates[position] for position in order[: self._count]]


def _shuffled(cycle: Cycle, count: int) -> list[int]:
    order = list(range(count))
    cycle.random.shuffle(order)
    return order
