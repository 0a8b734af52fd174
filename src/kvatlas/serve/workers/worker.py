"""Which of several workers a process is, and how it says so."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry, Gauge


class Worker(msgspec.Struct, frozen=True):
    """Which of the workers a process is."""

    number: int
    """From 0."""
    of: int
    """How many there are."""
    starts: int = 1
    """How often it was started."""

    def __str__(self) -> str:
        return f"{self.number} of {self.of}"


def show_worker(worker: Worker, registry: CollectorRegistry) -> None:
    """Let a process's metrics say which worker's they are."""
    starts = Gauge(
        "kvatlas_route_worker_starts",
        "How often this worker process was started; more than once: it died.",
        ("worker", "workers"),
        registry=registry,
    )
    starts.labels(str(worker.number), str(worker.of)).set(worker.starts)
