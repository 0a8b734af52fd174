"""Worker processes: a side's interpreter running ``benchmarks.sides.worker``, asked by JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.sides import dynamo_install

ROOT = Path(__file__).resolve().parents[2]

SideName = Literal["kvatlas", "dynamo"]


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; its traceback was printed."""


class Placement(NamedTuple):
    """Where processes run. Both sides get the same cores; ``feeding`` is for what publishes to them or writes beside them."""

    measured: tuple[int, ...]
    feeding: int

    @classmethod
    def of(cls, cores: int) -> Placement:
        """Measure on the last cores of those allowed, and feed from the first."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(tuple(allowed[-cores:]), allowed[0])


class Worker:
    """One process with one index in it. Closed at the end of ``worker``."""

    def __init__(self, side: SideName, place: Placement) -> None:
        python = sys.executable if side == "kvatlas" else str(dynamo_install.interpreter())
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), PYTHONHASHSEED="0", DYN_LOG="error")
        command = [python, "-m", "benchmarks.sides.worker", side, ",".join(map(str, place.measured))]
        self.side = side
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    def ask(self, what: str, **given: Any) -> Any:
        """Have the worker do ``what``; return what it measured."""
        self.start(what, **given)
        return self.answer()

    def start(self, what: str, **given: Any) -> None:
        """Ask without waiting for the answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **given}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; answer() says so

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"the {self.side} worker ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"the {self.side} worker: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()  # it ends at the end of its input
            self.process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@contextmanager
def worker(side: SideName, place: Placement) -> Iterator[Worker]:
    """Start a worker, pinned to the measured cores."""
    started = Worker(side, place)
    try:
        yield started
    finally:
        started.close()


@contextmanager
def both(place: Placement) -> Iterator[tuple[Worker, Worker]]:
    """Start a worker of kvatlas and one of Dynamo on the same cores; while one is asked the other sleeps."""
    with worker("kvatlas", place) as ours, worker("dynamo", place) as theirs:
        yield ours, theirs
