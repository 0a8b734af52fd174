"""A workload up to so many requests."""

from __future__ import annotations

from collections.abc import Iterator

from kvatlas.sim.workloads.workload import Arrival, Workload


class Limited:
    """Another workload that ends early: of what comes by itself and of what users go on with, together."""

    def __init__(self, workload: Workload, requests: int) -> None:
        self.name = workload.name
        self._workload = workload
        self._left = requests

    def arrivals(self) -> Iterator[Arrival]:
        arrivals = self._workload.arrivals()
        while self._left > 0 and (arrival := next(arrivals, None)) is not None:
            self._left -= 1
            yield arrival

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        if self._left <= 0:
            return None
        following = self._workload.after(answered, at_s)
        self._left -= following is not None
        return following
