"""Random numbers by place instead of by turn: the same user says the same, whoever is answered first."""

from __future__ import annotations

import math

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_SPREAD_MAX = 4.0


class Draws:
    """A stream of numbers that is told by where it is: a seed, then whatever numbers it: a session, a turn.

    SplitMix64; source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """

    __slots__ = ("_state",)

    def __init__(self, *place: int) -> None:
        state = 0
        for step in place:
            state = _mixed((state ^ step & _MASK) + _GOLDEN & _MASK)
        self._state = state

    def uniform(self) -> float:
        """Return a number from 0 up to 1, without 1."""
        self._state = self._state + _GOLDEN & _MASK
        return (_mixed(self._state) >> 11) * 2.0**-53

    def waiting(self, mean: float) -> float:
        """Return an exponential variate: the time between events that happen any time."""
        return -mean * math.log1p(-self.uniform())

    def below(self, count: int) -> int:
        """Return one of 0 to ``count - 1``."""
        return int(self.uniform() * count)

    def length(self, mean: float, spread: float) -> int:
        """Return a length of 1 or more: log-normal with this mean; ``spread`` is sigma, 0: always the mean.

        What lies beyond four sigma is cut there, so that no request is longer than any engine.
        """
        if not spread:
            return max(1, round(mean))
        normal = math.sqrt(-2 * math.log1p(-self.uniform())) * math.cos(math.tau * self.uniform())
        normal = max(-_SPREAD_MAX, min(_SPREAD_MAX, normal))
        return max(1, round(mean * math.exp(spread * normal - spread * spread / 2)))

    def count(self, mean: float) -> int:
        """Return a geometric variate of 1 or more: how often, where each time may be the last."""
        if mean <= 1:
            return 1
        return 1 + int(math.log1p(-self.uniform()) / math.log1p(-1 / mean))


def _mixed(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
