"""What an operator sees of prefix producers: how large their history is, and how long promises last. Read at every scrape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvatlas.route.prefix.approximate import ApproximatePrefixCache
from kvatlas.route.prefix.blended import BlendedPrefixCache
from kvatlas.route.prefix.history import HistoryStats
from kvatlas.route.prefix.lag import EventLag
from kvatlas.route.prefix.precise import PrecisePrefixCache


class ProducersCollector(Collector):
    """Of one router's producers, by their names in the configuration. Nothing before :meth:`watch`."""

    def __init__(self) -> None:
        self._histories: Mapping[str, ApproximatePrefixCache | BlendedPrefixCache] = {}
        self._lags: Mapping[str, EventLag] = {}

    def watch(self, plugins: Mapping[str, object]) -> None:
        """Show those of a router's plugins that are prefix producers."""
        with_history = (ApproximatePrefixCache, BlendedPrefixCache)
        self._histories = {name: one for name, one in plugins.items() if isinstance(one, with_history)}
        with_events = (PrecisePrefixCache, BlendedPrefixCache)
        self._lags = {name: one.lag for name, one in plugins.items() if isinstance(one, with_events)}

    def collect(self) -> Iterable[Metric]:
        yield from _history({name: one.stats() for name, one in self._histories.items()})
        ttl = GaugeMetricFamily(
            "kvatlas_route_promise_seconds", "How long a promised block lasts without its event.", labels=("producer",)
        )
        missed = CounterMetricFamily(
            "kvatlas_route_promises_missed",
            "Promised blocks, of the few that are watched, whose event never came.",
            labels=("producer",),
        )
        for name, lag in self._lags.items():
            ttl.add_metric((name,), lag.ttl_s)
            missed.add_metric((name,), lag.never_came)
        yield from (ttl, missed)


def _history(stats: Mapping[str, HistoryStats]) -> Iterable[Metric]:
    labels = ("producer",)
    size = GaugeMetricFamily("kvatlas_route_history_bytes", "Estimated memory of what was routed where.", labels=labels)
    blocks = GaugeMetricFamily("kvatlas_route_history_blocks", "Distinct blocks in it.", labels=labels)
    entries = GaugeMetricFamily("kvatlas_route_history_entries", "Pairs of block and endpoint in it.", labels=labels)
    evicted = CounterMetricFamily(
        "kvatlas_route_history_evictions",
        "Entries that went: capacity (their endpoint's cache holds no more), bytes (historyBytesMax).",
        labels=("producer", "reason"),
    )
    for name, one in stats.items():
        size.add_metric((name,), one.bytes_estimated)
        blocks.add_metric((name,), one.blocks)
        entries.add_metric((name,), one.entries)
        evicted.add_metric((name, "capacity"), one.evicted_capacity)
        evicted.add_metric((name, "bytes"), one.evicted_bytes)
    yield from (size, blocks, entries, evicted)
