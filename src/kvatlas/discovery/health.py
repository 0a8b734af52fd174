"""Which endpoints are in rotation: by what becomes of requests, and by whether their metrics can be fetched. No IO.

Two things take an endpoint out, each by itself. A circuit breaker counts requests that failed in a row; it opens, and after a
while lets one request try. And polls that find nobody, several in a row, mean that it is gone; the first one that is answered
brings it back. Health is a hint: where nobody is in rotation, a request is better sent somewhere than refused.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.tokens.remote.breaker import Breaker, BreakerState, Turn


class HealthState(enum.Enum):
    """``HEALTHY``: in rotation. ``FAILING``: requests fail. ``TRIAL``: one may try again. ``UNREACHABLE``: polls fail."""

    HEALTHY = "healthy"
    FAILING = "failing"
    TRIAL = "trial"
    UNREACHABLE = "unreachable"


class HealthLimits(msgspec.Struct, frozen=True):
    """When an endpoint is taken out, and for how long."""

    failures_max: int = 3
    """Requests that fail in a row."""
    retry_after_s: float = 5.0
    """How long no request is sent, before one may try."""
    polls_failed_max: int = 5
    """Polls in a row that find nobody."""


class Health:
    """The health of every endpoint of the pool. Thread-safe, never waits.

    A name that is not in the pool is healthy: it was just added, or is just going. ``changed`` is told when an endpoint's state
    becomes another by what was reported, on the reporter's thread; that a trial is due comes with time, and is not told.
    """

    def __init__(
        self,
        limits: HealthLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[EndpointName, HealthState], None] = lambda _name, _state: None,
    ) -> None:
        self._limits = limits or HealthLimits()
        self._clock = clock
        self._changed = changed
        self._lock = threading.Lock()
        self._endpoints: dict[EndpointName, _Endpoint] = {}

    def pool_changed(self, endpoints: Sequence[Endpoint]) -> None:
        """Know these endpoints; drop what is known of others. One at another address starts anew."""
        with self._lock:
            now: dict[EndpointName, _Endpoint] = {}
            for endpoint in endpoints:
                known = self._endpoints.get(endpoint.name)
                if known is None or known.url != endpoint.url:
                    known = _Endpoint(endpoint.url, self._breaker(endpoint.name))
                now[endpoint.name] = known
            self._endpoints = now  # at once: readers take no lock

    def healthy(self, name: EndpointName) -> bool:
        """Whether a request should be sent there now. In a trial it is for one request, until that reports."""
        known = self._endpoints.get(name)
        return known is None or (known.polls_failed < self._limits.polls_failed_max and known.breaker.passable)

    def state(self, name: EndpointName) -> HealthState:
        """Return an endpoint's state."""
        known = self._endpoints.get(name)
        if known is None:
            return HealthState.HEALTHY
        if known.polls_failed >= self._limits.polls_failed_max:
            return HealthState.UNREACHABLE
        return _STATES[known.breaker.state]

    def states(self) -> dict[EndpointName, HealthState]:
        """Return the state of every endpoint."""
        return {name: self.state(name) for name in list(self._endpoints)}

    def enter(self, name: EndpointName) -> Turn | None:
        """Return a request's turn, to be used in a ``with`` block; None where no request may be sent there now.

        ``succeeded()``: the engine answered, be it with a refusal (any status below 500). ``failed()``: no connection, it broke
        off, or a status from 500 on that is not 503 (busy). Neither, as after a client that left: nothing is learnt.
        """
        known = self._endpoints.get(name)
        return Breaker(1, 0.0).enter() if known is None else known.breaker.enter()

    def polled(self, name: EndpointName, reached: bool) -> None:
        """Note a poll: whether somebody was there, whatever it answered."""
        with self._lock:
            known = self._endpoints.get(name)
            if known is None:
                return
            was_gone = known.polls_failed >= self._limits.polls_failed_max
            known.polls_failed = 0 if reached else known.polls_failed + 1
            is_gone = known.polls_failed >= self._limits.polls_failed_max
        if was_gone != is_gone:
            self._changed(name, self.state(name))

    def _breaker(self, name: EndpointName) -> Breaker:
        def turned(_state: BreakerState) -> None:
            self._changed(name, self.state(name))

        return Breaker(self._limits.failures_max, self._limits.retry_after_s, self._clock, turned=turned)


class _Endpoint:
    __slots__ = ("breaker", "polls_failed", "url")

    def __init__(self, url: str, breaker: Breaker) -> None:
        self.url = url
        self.breaker = breaker
        self.polls_failed = 0


_STATES = {
    BreakerState.CLOSED: HealthState.HEALTHY,
    BreakerState.OPEN: HealthState.FAILING,
    BreakerState.HALF_OPEN: HealthState.TRIAL,
}
