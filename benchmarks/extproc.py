"""Decisions per second and added latency of the Envoy endpoint picker, with a real Envoy in front of engines that cost nothing.

Everything runs on this machine and shares its cores: wrk, Envoy, two engines and the picker. Prompts have 6.9 KB. Ours
tokenizes each and scores it precisely. The baselines are Envoy alone, sending round robin, and the plainest ext_proc server in
Python: gRPC's threaded one, which reads nothing and sends all to one engine. Answers are not shown to the picker, as in the
baseline, but in one scenario, where it learns from them.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.result import Result, against
from benchmarks.sides import BaselineError, Placement
from benchmarks.sides.process import ROOT
from benchmarks.sides.routers import MODEL, START_S, TINY, canned_engines, free_port
from benchmarks.sides.wrk import Load, load
from tests.models.envoy import Config, clusters_of, connection_manager, envoy, ext_proc

NAME = "extproc"
OURS = "kvatlas"
WATCHING = "kvatlas, answers shown"
STUB = "plain sync stub"
ALONE = "Envoy alone"
CONNECTIONS = (1, 32)
REACH = 3.0

Seen = dict[int, Load]


def run(*, quick: bool, place: Placement) -> list[Result]:
    """Measure with one connection and with 32."""
    seconds = 2 if quick else 10
    with canned_engines(2) as engines, tempfile.TemporaryDirectory() as folder:
        with _stub(engines) as ports:
            stub = _measure(Path(folder), engines, ports, seconds, _hidden)
        with _picker(engines, Path(folder) / "log") as ports:
            ours = _measure(Path(folder), engines, ports, seconds, _hidden)
            watching = _measure(Path(folder), engines, ports, seconds, _no_checks)
        alone = _measure(Path(folder), engines, (1, 1), seconds, _alone)
    return [*_rates(ours, watching, stub, alone), *_added(ours, stub, alone)]


def _rates(ours: Seen, watching: Seen, stub: Seen, alone: Seen) -> Iterator[Result]:
    def row(name: str, mine: Load, baseline: str, theirs: Load, reach: float | None = None) -> Result:
        text = f"{name}, 32 connections; p99 {mine.p99_s * 1e3:.1f} ms, {mine.failed} failed"
        rate = mine.requests_per_s
        return against(NAME, text, rate, "req/s", baseline, theirs.requests_per_s, higher_is_better=True, reach=reach)

    yield row(OURS, ours[32], STUB, stub[32], REACH)
    yield row(OURS, ours[32], ALONE, alone[32])
    yield row(WATCHING, watching[32], ALONE, alone[32])


def _added(ours: Seen, stub: Seen, alone: Seen) -> Iterator[Result]:
    for connections in CONNECTIONS:
        for percent in (50, 99):
            base, mine, theirs = (_latency_ms(seen[connections], percent) for seen in (alone, ours, stub))
            text = f"added p{percent}, {connections} connections (Envoy alone {base:.2f} ms)"
            yield against(NAME, text, mine - base, "ms", STUB, theirs - base, higher_is_better=False)


def _latency_ms(seen: Load, percent: int) -> float:
    return 1e3 * (seen.p50_s if percent == 50 else seen.p99_s)


def _measure(folder: Path, engines: list[str], ports: tuple[int, int], seconds: int, change: Callable[[Config], None]) -> Seen:
    async def measured() -> Seen:
        authorities = [engine.removeprefix("http://") for engine in engines]
        async with envoy(folder, ports, authorities, change) as url:
            await asyncio.to_thread(load, url, connections=32, seconds=1, stream=False)  # warm
            return {
                number: await asyncio.to_thread(load, url, connections=number, seconds=seconds, stream=False)
                for number in CONNECTIONS
            }

    return asyncio.run(measured())


def _no_checks(config: Config) -> None:
    del clusters_of(config)["picker"]["health_checks"]


def _hidden(config: Config) -> None:
    _no_checks(config)
    shown = {"response_header_mode": "SKIP", "response_body_mode": "NONE", "response_trailer_mode": "SKIP"}
    ext_proc(config)["processing_mode"].update(shown)


def _alone(config: Config) -> None:
    _no_checks(config)
    del connection_manager(config)["http_filters"][-2]


@contextmanager
def _stub(engines: list[str]) -> Iterator[tuple[int, int]]:
    command = [sys.executable, "-m", "benchmarks.sides.extproc_stub", engines[0].removeprefix("http://")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline()), 1
    finally:
        process.stdin.close()
        process.wait()


@contextmanager
def _picker(engines: list[str], log: Path) -> Iterator[tuple[int, int]]:
    port = free_port()
    named = [part for engine in engines for part in ("--endpoint", engine)]
    own = {
        f"tokens.models.{MODEL}": str(TINY),
        "log.level": "warning",
        "zmq.bind": "false",
        "api.grpcPort": "0",
        "extProc.healthPort": "0",
        "extProc.drainDelay": "0",
    }
    chosen = [part for path, value in own.items() for part in ("--set", f"{path}={value}")]
    command = [sys.executable, "-m", "kvatlas", "route", "--ext-proc", *named, "--port", str(port), "--api-port", "0", *chosen]
    with log.open("w") as written:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            _wait_until_it_listens(port, process, log)
            yield port, 1
        finally:
            process.terminate()
            process.wait()


def _wait_until_it_listens(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise BaselineError(f"the picker does not start; the end of its log: {log.read_text(errors='replace')[-500:]}")
