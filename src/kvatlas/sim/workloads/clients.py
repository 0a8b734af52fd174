"""Clients that do not wait for their whole answer."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from kvatlas.sim.workloads.draws import Draws
from kvatlas.sim.workloads.workload import Arrival, Workload

_PLACE = 11
"""Of the draws made here, among those of a seed."""


class Clients(msgspec.Struct, frozen=True, kw_only=True):
    """How long they wait. Whoever goes does not come again, and a chat ends with that."""

    patience_s: float | None = None
    """Whoever has no first token by then gives up; None: nobody."""
    cancel_share: float = 0.0
    """Share of requests that are cancelled in any case, if they are not answered before."""
    cancel_after_s: float = 5.0
    """When these are: the mean of an exponential time from their arrival."""


class Impatient:
    """Another workload, by clients who may go. Who does depends on the seed alone, whatever the policy."""

    def __init__(self, workload: Workload, clients: Clients, seed: int) -> None:
        self.name = workload.name
        self._workload = workload
        self._are = clients
        self._seed = seed

    def arrivals(self) -> Iterator[Arrival]:
        for number, arrival in enumerate(self._workload.arrivals()):
            yield self._waiting(arrival, Draws(self._seed, _PLACE, 0, number))

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        following = self._workload.after(answered, at_s)
        if following is None:
            return None
        return self._waiting(following, Draws(self._seed, _PLACE, 1, answered.session or 0, len(answered.tokens)))

    def _waiting(self, arrival: Arrival, draws: Draws) -> Arrival:
        cancelled = draws.uniform() < self._are.cancel_share
        cancel_after_s = draws.waiting(self._are.cancel_after_s) if cancelled else None
        return msgspec.structs.replace(arrival, patience_s=self._are.patience_s, cancel_after_s=cancel_after_s)
