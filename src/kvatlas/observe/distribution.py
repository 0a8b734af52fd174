"""Histograms for what happens with every request: prometheus_client's exposition, a tenth of the cost of its ``observe``.

A series counts under one lock, where prometheus_client takes one for each number, and finds its bucket by bisection.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Series:
    """One series: observations by bucket, and their sum. Any thread may observe."""

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        at = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[at] += 1
            self._sum += value

    def state(self) -> tuple[list[int], float]:
        """Return how many observations each bucket and those below it have, and the sum of all."""
        with self._lock:
            return list(accumulate(self._counts)), self._sum


class Distribution(Collector):
    """A histogram. Its label values have to be bounded by who gives them: a series stays for ever."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        """``buckets``: their upper bounds, which belong to them, in order."""
        self._name = name
        self._text = text
        self._labels = tuple(labels)
        self._bounds = [float(bound) for bound in buckets]
        self._series: dict[tuple[str, ...], Series] = {}
        if not labels:
            self.series()
        registry.register(self)

    def series(self, *values: str) -> Series:
        """Return the series of some label values; a new one where there is none. Keep it: looking it up costs as much again."""
        found = self._series.get(values)
        return found if found is not None else self._series.setdefault(values, Series(self._bounds))

    def describe(self) -> Iterable[Metric]:
        return [HistogramMetricFamily(self._name, self._text, labels=self._labels)]

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for values, series in list(self._series.items()):
            counts, total = series.state()
            family.add_metric(values, list(zip(names, counts, strict=True)), total)
        return [family]
