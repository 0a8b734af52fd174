"""What an operator sees of endpoints, in Prometheus terms. Series are few: none is by endpoint."""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvatlas.discovery.health import HealthState
from kvatlas.discovery.pace import PollOutcome
from kvatlas.route.endpoint import EndpointName

_POLL_BUCKETS_S = (1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5)


class DiscoveryMetrics:
    """All metrics of one discovery."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._polls = Counter(
            "kvatlas_route_polls",
            "Polls of engines' metrics, by outcome: reported, unreachable, late, refused, garbage.",
            ("outcome",),
            registry=registry,
        )
        self._by_outcome = {outcome: self._polls.labels(outcome.value) for outcome in PollOutcome}
        self._seconds = Histogram("kvatlas_route_poll_seconds", "Time of a poll.", registry=registry, buckets=_POLL_BUCKETS_S)
        self._failures = Counter(
            "kvatlas_route_discovery_failures",
            "Times that discovery met a new problem (a bad file, no API server); endpoints stayed as they were.",
            registry=registry,
        )
        self._changes = Counter("kvatlas_route_pool_changes", "Times that the pool was told anew.", registry=registry)
        self._states = _StateCollector()
        registry.register(self._states)

    def polled(self, outcome: PollOutcome, seconds: float) -> None:
        """Count a poll."""
        self._by_outcome[outcome].inc()
        self._seconds.observe(seconds)

    def failed(self) -> None:
        """Count a failure of discovery."""
        self._failures.inc()

    def changed(self) -> None:
        """Count a change of the pool."""
        self._changes.inc()

    def watch(self, states: Callable[[], Mapping[EndpointName, HealthState]]) -> None:
        """Show how many endpoints are in which state; called at every scrape."""
        self._states.states = states


class _StateCollector(Collector):
    states: Callable[[], Mapping[EndpointName, HealthState]] = staticmethod(dict)

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "kvatlas_route_endpoints",
            "Endpoints of the pool, by health: healthy, failing, trial, unreachable.",
            labels=("state",),
        )
        counts = Counted(self.states().values())
        for state in HealthState:
            family.add_metric((state.value,), counts[state])
        yield family
