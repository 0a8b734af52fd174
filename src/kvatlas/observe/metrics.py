"""What an operator can see, in Prometheus terms, on a registry of its own.

Every method may be called from any thread and costs a few microseconds. Pod and source labels are bounded: beyond the bound
new names are counted together as "other". Names of counters get Prometheus' ``_total`` when rendered.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvatlas.observe.distribution import Distribution
from kvatlas.observe.scrape import IndexCollector, TokensCollector, TokensState
from kvatlas.results import PodStatus
from kvatlas.types import ApplyReport, IndexStats

M = TypeVar("M", bound=MetricWrapperBase)

OTHER = "other"
HIT_RATIO_QUERIES = 1000
SOURCES_MAX = 10_000

_QUERY_BUCKETS_S = (50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS_BUCKETS_S = (100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LAG_BUCKETS_S = (1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """All metrics of one index. ``core``: the name of the index implementation."""

    def __init__(self, *, core: str = "reference", pods_max: int = 10_000) -> None:
        self._registry = CollectorRegistry()
        self._pods = LabelValues(pods_max)
        self._sources = LabelValues(SOURCES_MAX)
        self._connected: set[str] = set()
        self._hits = _HitWindow(HIT_RATIO_QUERIES)
        self._by_pod: list[MetricWrapperBase] = []
        self._lags_s: dict[str, float] = {}
        self._index = IndexCollector(self._pods.admit)
        self._registry.register(self._index)
        self._declare_write_path()
        self._declare_read_path()
        self._declare_tokens()
        build = self._gauge("kvatlas_build_info", "Version of kvatlas; always 1.", ("version",))
        build.labels(importlib.metadata.version("kvatlas")).set(1)
        self._core = self._gauge("kv_cache_core_info", "Which core does the hot work; always 1.", ("core",))
        self.core(core)
        self._keys = self._gauge("kv_cache_keys_info", "Of which kind keys are; always 1.", ("mode", "algorithm", "block_size"))

    def _declare_write_path(self) -> None:
        self._events = self._counter("kv_cache_events_received", "KV cache events decoded, by type.", ("pod", "type"))
        self._frames = self._counter("kv_cache_frames", "Event frames, by what became of them.", ("pod", "outcome"))
        self._blocks = self._counter("kv_cache_block_changes", "Blocks that events named, by effect.", ("pod", "change"))
        self._gaps = self._counter("kv_cache_gaps", "Times that sequence numbers were missing.", ("pod",))
        self._missed = self._counter("kv_cache_frames_missed", "Frames missing in gaps, before any replay.", ("pod",))
        self._replays = self._counter("kv_cache_replays", "Replays asked of engines, by outcome.", ("pod", "outcome"))
        self._replayed = self._counter("kv_cache_frames_replayed", "Frames that replays brought.", ("pod",))
        self._restarts = self._counter("kv_cache_engine_restarts", "Engine restarts seen in sequence numbers.", ("pod",))
        self._faults = self._counter("kv_cache_decode_errors", "Payloads or parts not understood.", ("pod", "reason"))
        self._last_lag = self._gauge("kv_cache_event_last_lag_seconds", "Lag of the last applied event.", ("pod",))
        self._lag = self._histogram(
            "kv_cache_event_lag_seconds", "From an engine's timestamp to its event applied.", (), _LAG_BUCKETS_S
        )
        self._connections = self._counter(
            "kv_cache_source_connections", "Connections of event sources: connected, disconnected, retry.", ("source", "event")
        )
        self._sources_connected = self._gauge("kv_cache_sources_connected", "Event sources connected now.")

    def _declare_read_path(self) -> None:
        self._queries = Distribution(
            "kv_cache_query_duration", "Time of an index query, in seconds.", ("operation",), _QUERY_BUCKETS_S, self._registry
        )
        ratio = self._gauge("kv_cache_hit_ratio", "Blocks found of blocks asked for, over the last 1000 queries.")
        ratio.set_function(lambda: self._hits.ratio)
        self._in_progress = self._gauge("kv_cache_queries_in_progress", "Requests admitted and not answered yet.")
        self._http = self._counter("kv_cache_http_requests", "HTTP requests answered.", ("route", "method", "status"))
        self._http_seconds = self._histogram(
            "kv_cache_http_request_seconds", "Time of an HTTP request.", ("route",), _QUERY_BUCKETS_S
        )
        self._grpc = self._counter("kv_cache_grpc_requests", "gRPC calls answered.", ("method", "code"))
        self._grpc_seconds = self._histogram(
            "kv_cache_grpc_request_seconds", "Time of a gRPC call.", ("method",), _QUERY_BUCKETS_S
        )

    def _declare_tokens(self) -> None:
        self._tokens = TokensCollector()
        self._registry.register(self._tokens)
        self._tokenization = self._histogram(
            "kv_cache_tokenization_seconds",
            "Time to a prompt's tokens, by where they came from: local, store, renderer, service.",
            ("source",),
            _TOKENS_BUCKETS_S,
        )
        self._prompt_tokens = self._counter(
            "kv_cache_prompt_tokens",
            "Prompt tokens told, by how: tokenized, or stored (known from a prefix that was seen before).",
            ("how",),
        )
        self._untokenized = self._counter(
            "kv_cache_tokenization_failures", "Prompts whose tokens could not be told, by reason.", ("reason",)
        )
        self._unscored = self._counter(
            "kv_cache_unscored_queries",
            "Queries answered without scores, by why there were no tokens.",
            ("reason",),
        )

    @property
    def registry(self) -> CollectorRegistry:
        """Where other parts of the service register theirs."""
        return self._registry

    @property
    def hit_ratio(self) -> float:
        """Blocks found of blocks asked for over the last 1000 queries that asked for any; 0 before the first."""
        return self._hits.ratio

    def core(self, name: str) -> None:
        """Say which index implementation runs."""
        self._core.clear()
        self._core.labels(name).set(1)

    def keys(self, mode: str, algorithm: str, block_size_tokens: int) -> None:
        """Say of which kind block keys are. ``algorithm``: of engine hashes, else empty."""
        self._keys.clear()
        self._keys.labels(mode, algorithm, str(block_size_tokens)).set(1)

    def frame(self, pod: str, outcome: str) -> None:
        """Count a frame: applied, duplicate, replayed, held or dropped."""
        self._frames.labels(self._pods.admit(pod), outcome).inc()

    def events(self, pod: str, kind: str, count: int) -> None:
        """Count decoded events of one type, such as BlockStored."""
        self._events.labels(self._pods.admit(pod), kind).inc(count)

    def applied(self, pod: str, report: ApplyReport) -> None:
        """Count what applying events did to blocks."""
        label = self._pods.admit(pod)
        for change in report.__struct_fields__:
            count = getattr(report, change)
            if count:
                self._blocks.labels(label, change).inc(count)

    def gap(self, pod: str, missed_frames: int) -> None:
        """Count a gap in a stream's sequence numbers."""
        label = self._pods.admit(pod)
        self._gaps.labels(label).inc()
        self._missed.labels(label).inc(missed_frames)

    def replay(self, pod: str, outcome: str, frames: int) -> None:
        """Count a replay: healed, incomplete, timeout or unavailable, and the frames that it brought."""
        label = self._pods.admit(pod)
        self._replays.labels(label, outcome).inc()
        self._replayed.labels(label).inc(frames)

    def restart(self, pod: str) -> None:
        """Count a restart of an engine."""
        self._restarts.labels(self._pods.admit(pod)).inc()

    def decode_fault(self, pod: str, reason: str) -> None:
        """Count something in a payload that was not understood."""
        self._faults.labels(self._pods.admit(pod), reason).inc()

    def lag(self, pod: str, seconds: float) -> None:
        """Note the time from an engine's timestamp to its event applied. Clocks differ: below zero counts as zero."""
        seconds = max(seconds, 0.0)
        self._lags_s[pod] = seconds
        self._lag.observe(seconds)
        self._last_lag.labels(self._pods.admit(pod)).set(seconds)

    def lags_s(self) -> dict[str, float]:
        """Return the lag of each pod's last applied event."""
        return self._lags_s.copy()

    def faults(self) -> dict[str, int]:
        """Return how many payloads or parts were not understood, by reason."""
        counts: dict[str, int] = {}
        for metric in self._faults.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    reason = sample.labels["reason"]
                    counts[reason] = counts.get(reason, 0) + int(sample.value)
        return counts

    def connection(self, source: str, event: str) -> None:
        """Count a source's connected, disconnected or retry, and keep how many are connected."""
        label = self._sources.admit(source)
        self._connections.labels(label, event).inc()
        if event == "connected":
            self._connected.add(label)
        elif event == "disconnected":
            self._connected.discard(label)
        self._sources_connected.set(len(self._connected))

    def query(self, operation: str, seconds: float, blocks: int, hit_blocks: int) -> None:
        """Note an index query: its time, the blocks that it asked for, and those that some pod held."""
        self._queries.series(operation).observe(seconds)
        if blocks > 0:
            self._hits.add(blocks, hit_blocks)

    def tokenized(self, source: str, seconds: float, tokens: int, stored: int) -> None:
        """Note a prompt's tokens: where they came from, how long it took, and how many of them a store knew."""
        self._tokenization.labels(source).observe(seconds)
        self._prompt_tokens.labels("stored").inc(stored)
        self._prompt_tokens.labels("tokenized").inc(max(0, tokens - stored))

    def tokenization_failed(self, reason: str) -> None:
        """Count a prompt whose tokens could not be told."""
        self._untokenized.labels(reason).inc()

    def unscored(self, reason: str) -> None:
        """Count a query that was answered without scores."""
        self._unscored.labels(reason).inc()

    def http(self, route: str, method: str, status: int, seconds: float) -> None:
        """Note an HTTP request. ``route``: the route's template, never the path that was asked for."""
        self._http.labels(route, method if method in _HTTP_METHODS else OTHER, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def grpc(self, method: str, code: str, seconds: float) -> None:
        """Note a gRPC call. ``method``: one that is served, or "unknown"."""
        self._grpc.labels(method, code).inc()
        self._grpc_seconds.labels(method).observe(seconds)

    def forget_pod(self, pod: str) -> None:
        """Drop the label sets of a pod that is gone, so that its last values do not stand for ever."""
        self._lags_s.pop(pod, None)
        if self._pods.forget(pod):
            for metric in self._by_pod:
                metric.remove_by_labels({"pod": pod})

    def observe_index(self, stats: Callable[[], IndexStats], pods: Callable[[], Sequence[PodStatus]]) -> None:
        """Show an index's sizes and its streams' states; both are called at every scrape. The last call counts."""
        self._index.watch(stats, pods)

    def observe_tokens(self, state: Callable[[], TokensState]) -> None:
        """Show what tokenization holds and waits for; called at every scrape."""
        self._tokens.watch(state)

    def observe_queries(self, in_progress: Callable[[], int]) -> None:
        """Show how many requests are in progress; called at every scrape."""
        self._in_progress.set_function(in_progress)

    def render(self) -> bytes:
        """Return all metrics in the Prometheus text format 0.0.4. Raises what ``stats`` or ``pods`` raise."""
        return generate_latest(_WithoutCreated(self._registry))

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return self._keep(Counter(name, text, labels, registry=self._registry), labels)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return self._keep(Gauge(name, text, labels, registry=self._registry), labels)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets_s: Sequence[float]) -> Histogram:
        return self._keep(Histogram(name, text, labels, registry=self._registry, buckets=buckets_s), labels)

    def _keep(self, metric: M, labels: Sequence[str]) -> M:
        if "pod" in labels:
            self._by_pod.append(metric)
        return metric


class LabelValues:
    """Label values, at most ``limit`` of them. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def admit(self, name: str) -> str:
        """Return a value, or "other" where it would be one too many."""
        if name in self._names:
            return name
        with self._lock:
            if len(self._names) >= self._limit:
                return OTHER
            self._names.add(name)
            return name

    def forget(self, name: str) -> bool:
        """Make room; return whether the value was known."""
        with self._lock:
            known = name in self._names
            self._names.discard(name)
            return known


class _HitWindow:
    """Hit and asked blocks of the last queries, with running sums."""

    def __init__(self, queries: int) -> None:
        self._window: deque[tuple[int, int]] = deque()
        self._queries = queries
        self._asked = 0
        self._hit = 0
        self._lock = threading.Lock()

    def add(self, asked: int, hit: int) -> None:
        with self._lock:
            if len(self._window) == self._queries:
                old_asked, old_hit = self._window.popleft()
                self._asked -= old_asked
                self._hit -= old_hit
            self._window.append((asked, hit))
            self._asked += asked
            self._hit += hit

    @property
    def ratio(self) -> float:
        with self._lock:
            return self._hit / self._asked if self._asked else 0.0


class _WithoutCreated(Collector):
    """A registry less the time each series was created: one series more for each, and nobody asks for it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
