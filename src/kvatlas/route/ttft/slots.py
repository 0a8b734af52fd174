"""How many requests an engine runs at the same time, from what it says of itself. No IO, no clock."""

from __future__ import annotations

from kvatlas.route.load import EngineReport

STUCK_REPORTS = 3
"""An engine that says so often that requests wait while equally many run has no more slots than these."""
MOST_MEMORY = 256
"""Reports with requests waiting, over which the most that ran is forgotten."""


class Slots:
    """A limit is believed where requests wait, equally many run again and again, and more were not seen to run.

    Without the last condition a prompt that takes long to compute looks like a limit: fewer run while it is computed.
    """

    __slots__ = ("_most", "_stuck", "last", "limit")

    def __init__(self) -> None:
        self.limit: int | None = None
        """None: it showed none."""
        self.last: EngineReport | None = None
        self._most = 0.0
        self._stuck = 0

    def learn(self, report: EngineReport) -> bool:
        """Take in a report, unless it is not newer than the last one. Return whether the limit changed."""
        before = self.last
        if before is not None and report.at_s <= before.at_s:
            return False
        self.last, limit = report, self.limit
        if limit is not None and report.running > limit:
            self.limit = None
        stuck = before is not None and report.waiting > 0 and before.waiting > 0 and before.running == report.running
        self._stuck = self._stuck + 1 if stuck else 0
        if report.waiting > 0:
            self._most *= 1 - 1 / MOST_MEMORY
        self._most = max(self._most, report.running)
        if self._stuck >= STUCK_REPORTS and report.running >= self._most:
            self.limit = max(1, report.running)
        return self.limit != limit
