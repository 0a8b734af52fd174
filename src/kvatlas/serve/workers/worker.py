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
    first_api_port: int | None = None
    """Where worker 0's API listens, the others' at the next ports; None: each has taken a free one."""

    @property
    def api_ports(self) -> tuple[int, ...]:
        """Where all workers' APIs listen, by number; empty where that is not known."""
        return () if self.first_api_port is None else tuple(range(self.first_api_port, self.first_api_port + self.of))

    @property
    def headers(self) -> dict[str, str]:
        """The headers of answers that hold for one worker alone."""
        ports = " ".join(map(str, self.api_ports))
        return {"x-kvatlas-worker": str(self), **({"x-kvatlas-api-ports": ports} if ports else {})}

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
