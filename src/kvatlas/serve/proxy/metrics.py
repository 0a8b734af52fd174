"""What an operator sees of the proxy itself; of routing, see serve/routing/metrics.py."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge


class ProxyMetrics:
    """Metrics of one proxy."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._answers = Counter("kvatlas_proxy_answers", "Answers sent to clients, by status.", ("status",), registry=registry)
        self._cut = Counter(
            "kvatlas_proxy_cut",
            "Requests that ended without a whole answer: the client left, or the proxy stopped.",
            registry=registry,
        )
        self._in_progress = Gauge("kvatlas_proxy_in_progress", "Requests in progress.", registry=registry)
        self._by_status = {status: self._answers.labels(str(status)) for status in (200, 400, 404, 429, 500, 502, 503, 504)}

    def answered(self, status: int) -> None:
        known = self._by_status.get(status)
        if known is None:  # as many as there are statuses: an engine's are three digits
            known = self._by_status[status] = self._answers.labels(str(status))
        known.inc()

    def cut(self) -> None:
        self._cut.inc()

    def observe(self, in_progress: Callable[[], float]) -> None:
        """Show what a function returns as the number of requests in progress."""
        self._in_progress.set_function(in_progress)
