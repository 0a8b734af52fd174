"""What an operator sees of the ext-proc endpoint picker. What it decides is counted with routing."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from kvatlas.serve.extproc.held import Room


class ExtProcMetrics:
    """All metrics of one picker."""

    def __init__(self, registry: CollectorRegistry, room: Room) -> None:
        self.open = Gauge("kvatlas_extproc_streams", "HTTP requests that Envoy tells of now.", registry=registry)
        self._ends = Counter(
            "kvatlas_extproc_ends",
            "Streams ended, by how: done, refused (the client was told so), envoy_closed, protocol_error, cancelled, failed.",
            ("how",),
            registry=registry,
        )
        held = Gauge("kvatlas_extproc_held_bytes", "Bodies held until they are complete and decided.", registry=registry)
        held.set_function(lambda: room.used_bytes)

    def ended(self, how: str) -> None:
        self._ends.labels(how).inc()
