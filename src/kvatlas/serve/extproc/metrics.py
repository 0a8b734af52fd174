"""What an operator sees of the ext-proc endpoint picker. What it decides is counted with routing."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge


class ExtProcMetrics:
    """All metrics of one picker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._open = Gauge("kvatlas_extproc_streams", "HTTP requests that Envoy tells of now.", registry=registry)
        self._ends = Counter(
            "kvatlas_extproc_ends",
            "Streams ended, by how: done, refused (the client was told so), envoy_closed, protocol_error, cancelled, failed.",
            ("how",),
            registry=registry,
        )
        self._held = Gauge("kvatlas_extproc_held_bytes", "Bodies held until they are complete and decided.", registry=registry)

    def observe(self, streams: Callable[[], float], held_bytes: Callable[[], float]) -> None:
        """Show what functions return as the streams in progress and the bytes that are held."""
        self._open.set_function(streams)
        self._held.set_function(held_bytes)

    def ended(self, how: str) -> None:
        self._ends.labels(how).inc()
