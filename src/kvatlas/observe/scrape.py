"""Metrics that are read from the index when they are asked for, rather than kept."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvatlas.results import PodStatus
from kvatlas.types import IndexStats, StaleReason


class IndexCollector(Collector):
    """Sizes of the index and states of its streams. Nothing before :meth:`watch`."""

    def __init__(self, pod_label: Callable[[str], str]) -> None:
        self._pod_label = pod_label
        self._watched: tuple[Callable[[], IndexStats], Callable[[], Sequence[PodStatus]]] | None = None

    def watch(self, stats: Callable[[], IndexStats], pods: Callable[[], Sequence[PodStatus]]) -> None:
        self._watched = (stats, pods)

    def collect(self) -> Iterable[Metric]:
        if self._watched is None:
            return
        stats, pods = self._watched
        yield from _sizes(stats())
        yield from self._streams(pods())

    def _streams(self, streams: Sequence[PodStatus]) -> Iterable[Metric]:
        by_state = Tally(stream.state for stream in streams)
        states = GaugeMetricFamily("kv_cache_streams", "Event streams (ranks of pods), by state.", labels=("state",))
        for state in sorted({"fresh", "stale", "connecting", *by_state}):
            states.add_metric((state,), by_state[state])
        yield states
        by_reason = Tally(stream.stale_reason for stream in streams)
        stale = GaugeMetricFamily("kv_cache_streams_stale", "Streams that may be wrong, by reason.", labels=("reason",))
        for reason in StaleReason:
            stale.add_metric((reason.value,), by_reason[reason])
        yield stale
        yield self._per_pod("kv_cache_pod_stale", "Streams of the pod that may be wrong.", streams, _is_stale)
        yield self._per_pod("kv_cache_pod_blocks", "Engine blocks resident in the pod.", streams, _blocks)
        yield self._per_pod("kv_cache_pod_orphans", "Resident blocks whose tokens are unknown.", streams, _orphans)
        yield self._per_pod("kv_cache_queue_depth", "Frames that wait to be applied.", streams, _queued)

    def _per_pod(
        self, name: str, text: str, streams: Sequence[PodStatus], value: Callable[[PodStatus], int]
    ) -> GaugeMetricFamily:
        sums: Tally[str] = Tally()
        for stream in streams:
            sums[self._pod_label(stream.pod)] += value(stream)
        family = GaugeMetricFamily(name, text, labels=("pod",))
        for pod, total in sums.items():
            family.add_metric((pod,), total)
        return family


def _sizes(stats: IndexStats) -> Iterable[Metric]:
    yield GaugeMetricFamily("kv_cache_blocks_total", "Distinct blocks that some pod holds.", value=stats.blocks)
    yield GaugeMetricFamily("kv_cache_pods_tracked", "Pods in the index.", value=stats.pods)
    yield GaugeMetricFamily("kv_cache_index_entries", "Pairs of block and place where it lies.", value=stats.entries)
    yield GaugeMetricFamily("kv_cache_index_bytes", "Estimated memory of the index.", value=stats.bytes_estimated)
    yield GaugeMetricFamily("kv_cache_orphans", "Blocks known by engine hash only.", value=stats.orphans)
    yield GaugeMetricFamily("kv_cache_speculative", "Entries promised and not confirmed yet.", value=stats.speculative)
    evictions = CounterMetricFamily("kv_cache_evictions", "Blocks dropped by a bound of the index.", labels=("reason",))
    evictions.add_metric(("ttl",), stats.evicted_ttl)
    evictions.add_metric(("size",), stats.evicted_size)
    evictions.add_metric(("bytes",), stats.evicted_bytes)
    yield evictions


def _is_stale(stream: PodStatus) -> int:
    return int(stream.stale_reason is not None)


def _blocks(stream: PodStatus) -> int:
    return stream.blocks


def _orphans(stream: PodStatus) -> int:
    return stream.orphans


def _queued(stream: PodStatus) -> int:
    return stream.queue_depth
