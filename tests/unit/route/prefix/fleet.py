"""A real index, fed by model engines: one a pod, whose events are published when a test says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvatlas.config import load_config
from kvatlas.index.choice import why_no_native
from kvatlas.indexer import Indexer
from tests.models.engine import ModelEngine
from tests.unit.route.prefix.making import MODEL

BLOCK = 4
CORES = ["reference"] if why_no_native() else ["reference", "native"]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Fleet:
    def __init__(self, index: Indexer, clock: Clock) -> None:
        self.index = index
        self.clock = clock
        self.engines: dict[str, ModelEngine] = {}
        self._published: dict[str, int] = {}

    def engine(self, pod: str, model: str = MODEL) -> ModelEngine:
        if pod not in self.engines:
            self.engines[pod] = ModelEngine(pod=pod, model=model, block_size=BLOCK, capacity=1000)
        return self.engines[pod]

    def serve(self, pod: str, prompt: list[int], *, lost: bool = False, model: str = MODEL) -> None:
        """Let a pod compute a prompt. ``lost``: its events never arrive, and the next ones show that."""
        engine = self.engine(pod, model)
        engine.request(prompt)
        first = self._published.get(pod, 0)
        self._published[pod] = len(engine.frames)
        if not lost:
            for frame in engine.frames[first:]:
                self.index.publish(frame)
            self.index.drain()


@contextmanager
def running_fleet(core: str, *overrides: str) -> Iterator[Fleet]:
    clock = Clock()
    given = (f"keys.blockSize={BLOCK}", "zmq.bind=false", "ingest.auditInterval=0", f"index.core={core}", *overrides)
    with Indexer(load_config(environ={}, overrides=given), clock=clock) as index:
        yield Fleet(index, clock)
