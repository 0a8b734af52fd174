"""An engine's metrics page, by vLLM 0.32's names. Times are those that clients see, in seconds."""

from __future__ import annotations

from collections.abc import Callable

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from kvatlas.sim.engines import EngineState

_LABELS = ("engine", "model_name")
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_REQUEST_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0)


class EngineMetrics:
    """Counts. ``load`` tells how busy the engine is when the page is asked for."""

    def __init__(self, model: str, block_size: int, gpu_blocks: int) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._gpu_blocks = gpu_blocks
        self._running = self._gauge("num_requests_running", "Requests that are computed.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait.")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of the KV blocks that running requests hold.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up on the GPU.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found there.")
        self._external_queries = self._counter("external_prefix_cache_queries", "Prompt tokens looked up in slower tiers.")
        self._external_hits = self._counter("external_prefix_cache_hits", "Prompt tokens found there.")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of requests that ran.")
        self._generated = self._counter("generation_tokens", "Tokens of answers.")
        self._preemptions = self._counter("num_preemptions", "Requests that had to begin again.")
        self._ttft = self._histogram("time_to_first_token_seconds", "From a request to its first token.", _TTFT_S)
        self._between = self._histogram("inter_token_latency_seconds", "From one token to the next.", _TOKEN_S)
        self._queue = self._histogram("request_queue_time_seconds", "From a request to its first step.", _REQUEST_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From a request to its last token.", _REQUEST_S)
        ended = Counter("vllm:request_success", "Requests that ended.", (*_LABELS, "finished_reason"), registry=self.registry)
        self._finished, self._aborted = (ended.labels("0", model, reason) for reason in ("length", "abort"))
        info = Info("vllm:cache_config", "The cache.", ("engine",), registry=self.registry)
        info.labels("0").info({"block_size": str(block_size), "num_gpu_blocks": str(gpu_blocks)})

    def page(self, load: Callable[[], EngineState]) -> bytes:
        """Return the page in Prometheus' text form."""
        state = load()
        self._running.set(state.running)
        self._waiting.set(state.waiting)
        self._usage.set(self.usage(state))
        return prometheus_client.generate_latest(self.registry)

    def usage(self, state: EngineState) -> float:
        """Return the share of the usable blocks that running requests hold."""
        return min(1.0, state.blocks_used / max(1, self._gpu_blocks - 1))

    def scheduled(self, prompt_tokens: int, cached_tokens: int, loaded_tokens: int, waited_s: float) -> None:
        """Count a request that runs for the first time."""
        self._prompt.inc(prompt_tokens)
        self._queries.inc(prompt_tokens)
        self._hits.inc(cached_tokens)
        self._external_queries.inc(prompt_tokens - cached_tokens)
        self._external_hits.inc(loaded_tokens)
        self._queue.observe(waited_s)

    def tokens(self, new: int, after_s: float, *, first: bool) -> None:
        """Count tokens that came so long after the one before, or after their request."""
        self._generated.inc(new)
        (self._ttft if first else self._between).observe(after_s)

    def preempted(self) -> None:
        self._preemptions.inc()

    def finished(self, took_s: float) -> None:
        self._finished.inc()
        self._e2e.observe(took_s)

    def aborted(self) -> None:
        self._aborted.inc()

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, _LABELS, registry=self.registry).labels("0", self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, _LABELS, registry=self.registry).labels("0", self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self.registry).labels("0", self._model)
