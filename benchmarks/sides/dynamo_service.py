"""NVIDIA Dynamo's standalone indexer: ``python -m dynamo.indexer`` reads engines' ZMQ frames and is asked over HTTP.

Workers are registered by ``POST /register``; it then connects a SUB socket to each. Its CPU time is the kernel's account of
the process. ``--threads 1``: one index thread (its default of 4 made no difference to CPU time here).
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.sides import dynamo_install
from benchmarks.sides.install import BaselineError
from benchmarks.sides.process import Placement
from benchmarks.sides.publisher import Frames
from benchmarks.streams import BLOCK_TOKENS, Chain

MODEL = "m"
_POLL_S = 0.05


class Service:
    """A running service. Ended by ``service``."""

    def __init__(self, place: Placement) -> None:
        self._port = _free_port()
        command = [str(dynamo_install.interpreter()), "-m", "dynamo.indexer", "--threads", "1"]
        command += ["--port", str(self._port), "--block-size", str(BLOCK_TOKENS)]
        environment = dict(os.environ, DYN_LOG="error")
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, place.measured)  # the child inherits it
        try:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        finally:
            os.sched_setaffinity(0, allowed)
        clock = ctypes.c_int()
        failed = ctypes.CDLL(None).clock_getcpuclockid(self.process.pid, ctypes.byref(clock))
        assert not failed, f"no CPU clock of process {self.process.pid}: errno {failed}"
        self._clock = clock.value

    def wait(self, timeout_s: float = 30.0) -> None:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5).close()
            except OSError:
                time.sleep(_POLL_S)
            else:
                return
        raise BaselineError(f"dynamo.indexer did not start (status {self.process.poll()})")

    def register(self, endpoints: list[str]) -> None:
        for number, endpoint in enumerate(endpoints):
            body = {"instance_id": number, "endpoint": endpoint, "model_name": MODEL, "block_size": BLOCK_TOKENS}
            self._post("/register", body)

    def cpu_s(self) -> float:
        """CPU seconds of all its threads so far."""
        return time.clock_gettime(self._clock)

    def resident_bytes(self) -> int:
        with open(f"/proc/{self.process.pid}/statm", encoding="utf-8") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def matched(self, chain: Chain) -> dict[int, int]:
        """Return the blocks of a chain that each worker holds."""
        answer = self._post("/query", {"token_ids": chain.tokens.tolist(), "model_name": MODEL})
        return {int(pod): tokens["0"] // BLOCK_TOKENS for pod, tokens in answer["scores"].items()}

    def wait_for(self, frames: Frames, pods: int, timeout_s: float = 300.0) -> None:
        """Return when all frames of all pods were applied."""
        until = time.monotonic() + timeout_s
        while len(self.matched(frames.sentinel)) < pods:
            if time.monotonic() > until:
                raise BaselineError("dynamo.indexer did not apply all frames in time")
            time.sleep(_POLL_S)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - http, to our own process
            return json.load(answer)


@contextmanager
def service(place: Placement) -> Iterator[Service]:
    """Start the service, pinned to the measured cores."""
    started = Service(place)
    try:
        started.wait()
        yield started
    finally:
        started.process.terminate()
        try:
            started.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            started.process.kill()
            started.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
