"""How long a call may take, and how many may be in progress."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvatlas.errors import TokenizationError, TokenizationReason

TEXT_CHARS_MAX = 500


class Deadline:
    """A point in time; all that a call does has to end before it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left; 0 where it has passed."""
        return max(0.0, self._at - self._clock())

    def share(self, parts: int) -> Deadline:
        """Return the deadline of the first of so many attempts that have the time left to themselves in equal parts."""
        return Deadline(self.left_s / parts, self._clock)


class Places:
    """At most so many calls in progress; more wait, in the order they came. ``setting`` names the bound in the refusal."""

    def __init__(self, calls_max: int, setting: str) -> None:
        self._calls_max = calls_max
        self._setting = setting
        self._lock = threading.Lock()
        self._free = calls_max
        self._waiting: deque[threading.Event] = deque()

    @contextmanager
    def taken(self, deadline: Deadline) -> Iterator[None]:
        """Hold a place for one call; wait for it within the call's time. TokenizationError (busy) where none comes free."""
        if not self._take(deadline):
            raise TokenizationError(
                TokenizationReason.BUSY,
                "prompt",
                f"{self._calls_max} calls are in progress ({self._setting}), and none ended in time",
                "ask again later, or raise the setting",
            )
        try:
            yield
        finally:
            self._give_back()

    def _take(self, deadline: Deadline) -> bool:
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return True
            handed_over = threading.Event()
            self._waiting.append(handed_over)
        if handed_over.wait(deadline.left_s):
            return True
        with self._lock:
            if handed_over.is_set():  # just now
                return True
            self._waiting.remove(handed_over)
            return False

    def _give_back(self) -> None:
        """Hand the place to who waits longest: who comes just now would else be faster, and that one wait for ever."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1


def remote_text(text: str) -> str:
    """Return what a remote said, fit for one line of ours: bounded, and without control characters."""
    cut = text if len(text) <= TEXT_CHARS_MAX else f"{text[:TEXT_CHARS_MAX]}..."
    return " ".join("".join(char if char.isprintable() else " " for char in cut).split())
