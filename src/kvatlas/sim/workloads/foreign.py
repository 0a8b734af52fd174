"""Requests that reach engines without passing the router: another router's, or of clients that know an engine's address.

The router under test sees them only in what engines report and in their events.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import msgspec

from kvatlas.sim.workloads.draws import Draws
from kvatlas.sim.workloads.workload import Arrival, Workload

FOREIGN = "foreign"
"""Whose requests those of a workload beside another one are."""
_PLACE = 12
"""Of the draws made here, among those of a seed."""
_MARK = 1 << 30
"""In the first token of all that another workload sends: so no prompt of one begins as one of the other does."""


class Strays:
    """A workload of which a share passes the router by, each request at any engine: another router sends these."""

    def __init__(self, workload: Workload, share: float, engines: Sequence[int], seed: int) -> None:
        self.name = workload.name
        self._workload = workload
        self._share = share
        self._engines = engines
        self._seed = seed

    def arrivals(self) -> Iterator[Arrival]:
        for number, arrival in enumerate(self._workload.arrivals()):
            yield self._aimed(arrival, Draws(self._seed, _PLACE, 0, number))

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        following = self._workload.after(answered, at_s)
        if following is None:
            return None
        return self._aimed(following, Draws(self._seed, _PLACE, 1, answered.session or 0, len(answered.tokens)))

    def _aimed(self, arrival: Arrival, draws: Draws) -> Arrival:
        if draws.uniform() >= self._share:
            return arrival
        return msgspec.structs.replace(arrival, engine=self._engines[draws.below(len(self._engines))])


class Beside:
    """A workload, and another one beside it whose requests go to some engines in turns.

    The other one ends with what comes of the first by itself.
    """

    def __init__(self, workload: Workload, foreign: Workload, engines: Sequence[int]) -> None:
        self.name = workload.name
        self._workload = workload
        self._foreign = foreign
        self._engines = itertools.cycle(engines)
        self._ended = False

    def arrivals(self) -> Iterator[Arrival]:
        foreign = map(self._aimed, self._foreign.arrivals())
        coming = next(foreign, None)
        for arrival in self._workload.arrivals():
            while coming is not None and coming.at_s <= arrival.at_s:
                yield coming
                coming = next(foreign, None)
            yield arrival
        self._ended = True

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        if answered.tenant != FOREIGN:
            return self._workload.after(answered, at_s)
        if self._ended:
            return None
        following = self._foreign.after(msgspec.structs.replace(answered, session=_other(answered.session), tenant=""), at_s)
        return None if following is None else self._aimed(following)

    def _aimed(self, arrival: Arrival) -> Arrival:
        tokens = arrival.tokens[:]
        tokens[0] |= _MARK
        session, engine = _other(arrival.session), next(self._engines)
        return msgspec.structs.replace(arrival, tokens=tokens, session=session, tenant=FOREIGN, phase="", engine=engine)


def _other(session: int | None) -> int | None:
    """Return a session's name beside those of another workload, and the other way round: below 0, none of these has it."""
    return None if session is None else ~session
