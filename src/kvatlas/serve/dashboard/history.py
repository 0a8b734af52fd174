"""The last half hour in steps, in arrays of a fixed size; and how much counters grew of late. No IO, no clock."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

STEP_S = 2.0
STEPS_MAX = 900
COLUMNS = ("requests", "prompt_tokens", "saved_tokens", "ttft_p50_s", "ttft_p90_s")
WINDOW_S = 300.0


class HistoryShown(msgspec.Struct, frozen=True):
    """Steps, the oldest first: counts are those within a step, None: nothing to tell."""

    first: int
    """The first step's number; they are counted from the service's start."""
    step_s: float
    steps_max: int
    columns: Mapping[str, list[float | None]]


class History:
    """Rings of numbers: 900 steps of 2 s in five columns are 36 KB, whatever happens."""

    def __init__(self, steps_max: int = STEPS_MAX) -> None:
        self._steps_max = steps_max
        self._columns = {name: array("d", [math.nan]) * steps_max for name in COLUMNS}
        self.count = 0
        """Steps so far."""

    def add(self, values: Mapping[str, float]) -> None:
        """Add a step. What ``values`` lacks is not known of it."""
        at = self.count % self._steps_max
        for name, column in self._columns.items():
            column[at] = values.get(name, math.nan)
        self.count += 1

    def since(self, first: int) -> HistoryShown:
        """Return the steps from number ``first`` on, as far as they are kept."""
        first = min(self.count, max(first, self.count - self._steps_max))
        numbers = range(first, self.count)
        columns = {
            name: [_known(column[number % self._steps_max]) for number in numbers] for name, column in self._columns.items()
        }
        return HistoryShown(first, STEP_S, self._steps_max, columns)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile of values, by nearest rank; NaN of none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


class Increase:
    """How much counters grew within the last five minutes."""

    def __init__(self, window_s: float = WINDOW_S, looks_max: int = int(WINDOW_S / STEP_S) + 2) -> None:
        self._window_s = window_s
        self._looks: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=looks_max)

    def look(self, now_s: float, counters: Mapping[str, float]) -> dict[str, float]:
        """Note where counters stand; return by how much each grew, since the first look where that is less long ago."""
        while self._looks and now_s - self._looks[0][0] > self._window_s:
            self._looks.popleft()
        self._looks.append((now_s, counters))
        before = self._looks[0][1]
        return {name: value - before.get(name, 0.0) for name, value in counters.items()}

    @property
    def seconds(self) -> float:
        """How long ago the first look was that growth is told from."""
        return self._looks[-1][0] - self._looks[0][0] if self._looks else 0.0
