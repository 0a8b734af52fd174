"""What an operator sees of admission: what waits by priority, for how long, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvatlas.route.flow.waiting_room import BANDS_MAX
from kvatlas.serve.admission import AdmissionEnd, AdmissionStats

PRIORITIES_MAX = 2 * BANDS_MAX
OTHER = "other"

_WAIT_BUCKETS_S = (1e-3, 5e-3, 25e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class AdmissionMetrics:
    """All metrics of one admission, as its observer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._priorities: dict[int, str] = {}
        self._ends = Counter(
            "kvatlas_route_admissions",
            "Requests that asked for admission, by what became of them: " + ", ".join(end.value for end in AdmissionEnd) + ".",
            ("priority", "end"),
            registry=registry,
        )
        self._waits = Histogram(
            "kvatlas_route_admission_wait_seconds",
            "Time in the waiting room, where there is flow control.",
            ("priority",),
            registry=registry,
            buckets=_WAIT_BUCKETS_S,
        )
        self._waiting = _WaitingCollector()
        registry.register(self._waiting)

    def ended(self, priority: int, end: AdmissionEnd, waited_s: float) -> None:
        """Count a request. Priorities beyond the first PRIORITIES_MAX are counted together as ``other``."""
        label = self._priorities.get(priority)
        if label is None:
            label = OTHER if len(self._priorities) >= PRIORITIES_MAX else self._priorities.setdefault(priority, str(priority))
        self._ends.labels(label, end.value).inc()
        if waited_s > 0:
            self._waits.labels(label).observe(waited_s)

    def watch(self, stats: Callable[[], AdmissionStats]) -> None:
        """Show what waits; called at every scrape."""
        self._waiting.stats = stats


class _WaitingCollector(Collector):
    stats: Callable[[], AdmissionStats] | None = None

    def collect(self) -> Iterable[Metric]:
        requests = GaugeMetricFamily(
            "kvatlas_route_waiting_requests", "Requests that wait for admission.", labels=("priority",)
        )
        size = GaugeMetricFamily("kvatlas_route_waiting_bytes", "Their bodies.", labels=("priority",))
        saturation = GaugeMetricFamily(
            "kvatlas_route_saturation", "How busy the pool was at the last look; from 1 on requests wait."
        )
        told = None if self.stats is None else self.stats()
        for band in told.bands if told is not None else ():
            requests.add_metric((str(band.priority),), band.requests)
            size.add_metric((str(band.priority),), band.bytes)
        if told is not None and told.saturation is not None:
            saturation.add_metric((), told.saturation)
        yield from (requests, size, saturation)
