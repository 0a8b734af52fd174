"""Load that engines tell with their answers (ORCA), for both front doors: asked for, learnt, and kept from clients.

Of an engine with several data-parallel ranks nothing is learnt: vLLM tells one of them, and not which. It tells with answers
that are no streams.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from kvatlas.discovery.orca import BINARY_HEADER, HEADER, REQUEST_HEADER, OrcaError, read_orca
from kvatlas.route.endpoint import Endpoint
from kvatlas.route.router import Router
from kvatlas.serve.routing.metrics import RoutingMetrics

ASKING, FORMAT = REQUEST_HEADER
TELLING = (HEADER, BINARY_HEADER)


class LoadHeaders:
    """What is put on requests, and read of answers."""

    def __init__(
        self, router: Router, metrics: RoutingMetrics, *, ask: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``ask``: with every request; what comes without being asked for is read in any case. ``clock``: the router's."""
        self._router = router
        self._metrics = metrics
        self._ask = ask
        self._clock = clock

    def to_engine(self, asked: Mapping[str, str]) -> Mapping[str, str]:
        """Return what to put on a request. ``asked``: the client's headers, which go first."""
        return {ASKING: FORMAT} if self._ask and ASKING not in asked else {}

    def hidden(self, asked: Mapping[str, str]) -> Collection[str]:
        """Return the headers of an answer that are not for the client: all, unless it asked itself."""
        return () if ASKING in asked else TELLING

    def learn(self, endpoint: Endpoint, answer: Mapping[str, str]) -> bool:
        """Note what an answer's headers say of its engine's load; what they do not say stays as it was reported last.

        Return whether the router knows something new.
        """
        try:
            load = read_orca(answer)
        except OrcaError:
            self._metrics.load_told("unreadable")
            return False
        if load is None:
            return False
        report = None if endpoint.names_rank else load.onto(self._router.load(endpoint.name).report, self._clock())
        self._metrics.load_told("left_out" if report is None else "taken")
        if report is not None:
            self._router.report(endpoint.name, report)
        return report is not None
