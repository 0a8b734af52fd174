"""Metrics that are read from the index when they are asked for, rather than kept."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
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


class TokensState(msgspec.Struct, frozen=True):
    """What tokenization holds and waits for."""

    in_flight: int
    """Prompts that are tokenized or wait for it."""
    shared: int
    """Prompts that equal work in flight served, so far."""
    tokenizers: int
    """Loaded ones."""
    store_bytes: int
    store_entries: int
    store_evicted: int
    """So far."""
    store_mismatches: int
    """Texts tokenized in full because the stored tokens did not fit, so far."""
    store_audit_failures: int
    """Times that a check of the store found a wrong token; it is off then."""
    circuits: Mapping[str, str]
    """By remote tokenizer: closed, open, half-open."""


class TokensCollector(Collector):
    """State of tokenization. Nothing before :meth:`watch`."""

    def __init__(self) -> None:
        self._state: Callable[[], TokensState] | None = None

    def watch(self, state: Callable[[], TokensState]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        if self._state is None:
            return
        now = self._state()
        yield GaugeMetricFamily("kv_cache_tokenizations_in_flight", "Prompts tokenized now or waiting.", now.in_flight)
        yield CounterMetricFamily("kv_cache_tokenizations_shared", "Prompts that equal work in flight served.", now.shared)
        yield GaugeMetricFamily("kv_cache_tokenizers_loaded", "Tokenizers in memory.", now.tokenizers)
        yield GaugeMetricFamily("kv_cache_prefix_store_bytes", "Estimated memory of known text prefixes.", now.store_bytes)
        yield GaugeMetricFamily("kv_cache_prefix_store_entries", "Pieces of text whose tokens are known.", now.store_entries)
        yield CounterMetricFamily("kv_cache_prefix_store_evictions", "Pieces given up for room.", now.store_evicted)
        yield CounterMetricFamily(
            "kv_cache_prefix_store_mismatches", "Texts tokenized in full as stored tokens did not fit.", now.store_mismatches
        )
        yield CounterMetricFamily(
            "kv_cache_prefix_store_audit_failures", "Checks that found a wrong stored token.", now.store_audit_failures
        )
        circuits = GaugeMetricFamily(
            "kv_cache_remote_tokenizer_up", "1: asked as usual; 0: left alone after failures.", labels=("endpoint",)
        )
        for endpoint, circuit in now.circuits.items():
            circuits.add_metric((endpoint,), float(circuit == "closed"))
        yield circuits
