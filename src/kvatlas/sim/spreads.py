"""How values lie, in little memory however many there are."""

from __future__ import annotations

import math

from kvatlas.sim.results import Spread

VALUE_MIN_S = 1e-6
"""Smaller values count as this one, or as 0."""
VALUE_MAX_S = 1e7
_BUCKETS_AN_E = 51.0
"""So that the ends of a bucket lie within 2 % of each other, and its middle within 1 % of both."""
_FIRST = math.log(VALUE_MIN_S) * _BUCKETS_AN_E


class SpreadCounter:
    """Counts values of 0 or more by their logarithm: quantiles are exact within 1 %, in about 1,500 numbers."""

    __slots__ = ("_count", "_counts", "_max", "_sum", "_zeros")

    def __init__(self) -> None:
        self._counts = [0] * (1 + int(math.log(VALUE_MAX_S) * _BUCKETS_AN_E - _FIRST))
        self._zeros = 0
        self._count = 0
        self._sum = 0.0
        self._max = 0.0

    def add(self, value_s: float) -> None:
        self._count += 1
        self._sum += value_s
        self._max = max(self._max, value_s)
        if value_s <= VALUE_MIN_S:
            self._zeros += 1
        elif value_s < VALUE_MAX_S:
            self._counts[int(math.log(value_s) * _BUCKETS_AN_E - _FIRST)] += 1
        else:
            self._counts[-1] += 1

    def spread(self) -> Spread:
        if not self._count:
            return Spread()
        p50, p90, p99 = (self._quantile(share) for share in (0.5, 0.9, 0.99))
        return Spread(count=self._count, mean=self._sum / self._count, p50=p50, p90=p90, p99=p99, max=self._max)

    def _quantile(self, share: float) -> float:
        """Return the smallest value that at least a share of all are not above."""
        wanted = math.ceil(share * self._count)
        seen = self._zeros
        if seen >= wanted:
            return 0.0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return min(math.exp((bucket + 0.5 + _FIRST) / _BUCKETS_AN_E), self._max)
        return self._max
