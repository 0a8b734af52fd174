"""What a check says."""

from __future__ import annotations

import enum

import msgspec


class Outcome(enum.Enum):
    """``WARN``: works, with a limit that is worth knowing. ``FAIL``: does not work. ``SKIP``: could not be checked."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Check(msgspec.Struct, frozen=True):
    """One thing looked at."""

    subject: str
    """What was looked at: ``installation``, a service's URL, an engine's endpoint."""
    name: str
    outcome: Outcome
    seen: str
    remedy: str | None = None
    """What to do; None where nothing is to be done."""


class CheckList:
    """Checks of one subject, in order."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self.checks: list[Check] = []

    def ok(self, name: str, seen: str, remedy: str | None = None) -> None:
        self._add(name, Outcome.OK, seen, remedy)

    def warn(self, name: str, seen: str, remedy: str) -> None:
        self._add(name, Outcome.WARN, seen, remedy)

    def fail(self, name: str, seen: str, remedy: str) -> None:
        self._add(name, Outcome.FAIL, seen, remedy)

    def skip(self, name: str, seen: str, remedy: str | None = None) -> None:
        self._add(name, Outcome.SKIP, seen, remedy)

    def _add(self, name: str, outcome: Outcome, seen: str, remedy: str | None) -> None:
        self.checks.append(Check(self._subject, name, outcome, seen, remedy))
