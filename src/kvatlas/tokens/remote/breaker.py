"""A circuit breaker: an endpoint that failed several times in a row is left alone for a while, then tried by one call."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from types import TracebackType


class BreakerState(enum.Enum):
    """``CLOSED``: calls pass. ``OPEN``: none does. ``HALF_OPEN``: one may pass, and decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Lets calls pass, or not. ``failures_max`` failures in a row open it; ``retry_after_s`` later one call may try.

    ``clock`` returns seconds that never fall. May be used from several threads; does no IO.
    """

    def __init__(
        self,
        failures_max: int,
        retry_after_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        turned: Callable[[BreakerState], None] = lambda _state: None,
    ) -> None:
        """``turned``: told when it opens (also again) and closes, by the thread that reported."""
        self._turned = turned
        self._failures_max = failures_max
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._opened_at: float | None = None
        self._trial = False
        self._era = 0  # counts openings and closings: what a call of an earlier one reports says nothing about now

    @property
    def state(self) -> BreakerState:
        with self._lock:
            return self._state()

    @property
    def passable(self) -> bool:
        """Whether a call may pass now."""
        with self._lock:
            state = self._state()
            return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and not self._trial)

    @property
    def retry_in_s(self) -> float:
        """Seconds until a call may pass; 0 where one may pass now."""
        with self._lock:
            return 0.0 if self._opened_at is None else max(0.0, self._opened_at + self._retry_after_s - self._clock())

    def enter(self) -> Turn | None:
        """Return a turn for one call, to be used in a ``with`` block; None where none may pass now."""
        with self._lock:
            state = self._state()
            if state is BreakerState.OPEN or (state is BreakerState.HALF_OPEN and self._trial):
                return None
            self._trial = state is BreakerState.HALF_OPEN
            return Turn(self, self._era)

    def _state(self) -> BreakerState:
        if self._opened_at is None:
            return BreakerState.CLOSED
        if self._clock() < self._opened_at + self._retry_after_s:
            return BreakerState.OPEN
        return BreakerState.HALF_OPEN

    def _succeeded(self, era: int) -> None:
        with self._lock:
            if era != self._era:
                return
            self._failures = 0
            closes = self._opened_at is not None
            if closes:
                self._opened_at = None
                self._trial = False
                self._era += 1
        if closes:
            self._turned(BreakerState.CLOSED)

    def _failed(self, era: int) -> None:
        with self._lock:
            if era != self._era:
                return
            self._failures += 1
            opens = self._opened_at is not None or self._failures >= self._failures_max
            if opens:
                self._opened_at = self._clock()
                self._trial = False
                self._era += 1
        if opens:
            self._turned(BreakerState.OPEN)

    def _left(self, era: int) -> None:
        with self._lock:
            if era == self._era:
                self._trial = False


class Turn:
    """One call that may pass. It reports how the endpoint did; where it reports nothing, nothing was learnt of it."""

    def __init__(self, breaker: Breaker, era: int) -> None:
        self._breaker = breaker
        self._era = era
        self._reported = False

    def succeeded(self) -> None:
        """The endpoint answered, be it with a refusal."""
        if not self._reported:
            self._reported = True
            self._breaker._succeeded(self._era)

    def failed(self) -> None:
        """It did not answer, or with nonsense."""
        if not self._reported:
            self._reported = True
            self._breaker._failed(self._era)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if not self._reported:
            self._reported = True
            self._breaker._left(self._era)
