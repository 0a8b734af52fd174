"""When an engine is polled next. No IO."""

from __future__ import annotations

import enum
import random

import msgspec

DOUBLINGS_MAX = 30


class PollOutcome(enum.Enum):
    """What became of a poll: short and bounded in number, as a metric's label."""

    REPORTED = "reported"
    UNREACHABLE = "unreachable"
    """No connection, or it broke off."""
    LATE = "late"
    """Somebody is there, and did not answer in time."""
    REFUSED = "refused"
    """A status other than 200."""
    GARBAGE = "garbage"
    """The answer makes no report."""

    @property
    def reached(self) -> bool | None:
        """Whether somebody is there; None where that remains open: a busy engine may be late."""
        return None if self is PollOutcome.LATE else self is not PollOutcome.UNREACHABLE


class PollLimits(msgspec.Struct, frozen=True):
    """How often engines are asked, and what that may cost."""

    interval_s: float = 0.05
    timeout_s: float = 1.0
    """To connect; and as long again for the answer."""
    backoff_max_s: float = 5.0
    """Longest wait after failures."""
    at_once_max: int = 64
    """Requests in progress; further ones wait."""
    page_bytes_max: int = 4 << 20
    """A longer answer makes no report."""


def wait_s(limits: PollLimits, took_s: float, failures: int, random: random.Random) -> float:
    """Return how long to wait after a poll, the last of so many failures in a row.

    A slow engine is asked less often: at most half of the time there is a request. After failures the wait doubles up to its
    bound, less up to a half at random, so that engines that went together do not come back together.
    """
    if failures == 0:
        return max(limits.interval_s - took_s, took_s)
    doubled = limits.interval_s * float(2 ** min(failures, DOUBLINGS_MAX))
    return min(limits.backoff_max_s, doubled) * random.uniform(0.5, 1.0)
