"""Arrivals that know nothing of each other."""

from __future__ import annotations

from collections.abc import Iterator

from kvatlas.sim.workloads.draws import Draws


def poisson(draws: Draws, rate_per_s: float, from_s: float, duration_s: float) -> Iterator[float]:
    """Yield the times of a Poisson process, from ``from_s`` on for ``duration_s``."""
    at_s = from_s + draws.waiting(1 / rate_per_s)
    while at_s < from_s + duration_s:
        yield at_s
        at_s += draws.waiting(1 / rate_per_s)
