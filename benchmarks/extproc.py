"""Decisions per second and added latency of the Envoy endpoint picker, with a real Envoy and engines that cost nothing.

Everything runs on this machine and shares its cores: wrk, Envoy, two engines and the picker. Prompts have 6.9 KB. There are
two pickers of ours: ``kvatlas route --ext-proc`` as it is, which tokenizes each prompt and scores it precisely, and the same
front door over a policy that costs nothing and without tokens, which is what the baseline does. The baselines are Envoy alone,
sending round robin, and the plainest ext_proc server in Python: gRPC's threaded one, which reads nothing and sends all to one
engine. Answers are not shown to the picker, as in the baseline, but in one scenario, where it learns from them. CPU time is the
picker's own: it depends least on what else the machine does.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.result import Result, against
from benchmarks.sides import BaselineError, Placement
from benchmarks.sides.process import ROOT
from benchmarks.sides.routers import MODEL, START_S, TINY, canned_engines, free_port
from benchmarks.sides.wrk import Load, load
from tests.models.envoy import Config, clusters_of, connection_manager, envoy, ext_proc

NAME = "extproc"
OURS = "kvatlas"
DOOR = "kvatlas, no tokens, no policy"
WATCHING = "kvatlas, answers shown"
STUB = "plain sync stub"
ALONE = "Envoy alone"
CONNECTIONS = (1, 32)
REACH = 3.0


class Seen(msgspec.Struct, frozen=True):
    """What one picker was seen to do."""

    loads: dict[int, Load]
    """By connections."""
    cpu_us: float
    """The picker's own, a request, with 32 connections."""


def run(*, quick: bool, place: Placement) -> list[Result]:
    """Measure with one connection and with 32."""
    seconds = 2 if quick else 10
    with canned_engines(2) as urls, tempfile.TemporaryDirectory() as folder:
        engines = [url.removeprefix("http://") for url in urls]
        bench = Bench(Path(folder), engines, seconds)
        stub = ["benchmarks.sides.extproc_stub", engines[0]]
        with picker(stub, Path(folder) / "stub") as one:
            seen = {STUB: bench.measure(one, _hidden)}
        with picker(["tests.models.picker", *engines], Path(folder) / "door") as one:
            seen[DOOR] = bench.measure(one, _hidden)
        port = free_port()
        with picker(_kvatlas(port, urls), Path(folder) / "kvatlas", port) as one:
            seen[OURS] = bench.measure(one, _hidden)
            seen[WATCHING] = bench.measure(one, _no_checks)
        seen[ALONE] = bench.measure(None, _alone)
    return [*_rates(seen), *_cpu(seen), *_added(seen)]


def _rates(seen: dict[str, Seen]) -> Iterator[Result]:
    for name, baseline, reach in ((DOOR, STUB, REACH), (OURS, STUB, REACH), (OURS, ALONE, None), (WATCHING, ALONE, None)):
        mine = seen[name].loads[32]
        text = f"{name}; 32 connections, p99 {mine.p99_s * 1e3:.1f} ms, {mine.failed} failed"
        rate, theirs = mine.requests_per_s, seen[baseline].loads[32].requests_per_s
        yield against(NAME, text, rate, "req/s", baseline, theirs, higher_is_better=True, reach=reach)


def _cpu(seen: dict[str, Seen]) -> Iterator[Result]:
    for name in (DOOR, OURS, WATCHING):
        text = f"{name}; CPU time a request"
        yield against(NAME, text, seen[name].cpu_us, "us", STUB, seen[STUB].cpu_us, higher_is_better=False)


def _added(seen: dict[str, Seen]) -> Iterator[Result]:
    for connections in CONNECTIONS:
        for percent in (50, 99):
            alone, stub = (_latency_ms(seen[name].loads[connections], percent) for name in (ALONE, STUB))
            for name in (DOOR, OURS):
                added = _latency_ms(seen[name].loads[connections], percent) - alone
                beside = f"stub adds {stub - alone:.2f} ms, Envoy alone takes {alone:.2f} ms"
                yield Result(NAME, f"{name}; added p{percent}, {connections} connections; {beside}", added, "ms", False)


def _latency_ms(seen: Load, percent: int) -> float:
    return 1e3 * (seen.p50_s if percent == 50 else seen.p99_s)


class Picker(NamedTuple):
    """A running one."""

    port: int
    process: subprocess.Popen[str]

    def cpu_s(self) -> float:
        """Return the CPU time that it used until now."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Bench(NamedTuple):
    """What all are measured with."""

    folder: Path
    engines: list[str]
    seconds: int

    def measure(self, one: Picker | None, change: Callable[[Config], None]) -> Seen:
        """Put an Envoy in front of a picker and load it."""

        async def measured() -> Seen:
            ports = (1 if one is None else one.port, 1)
            async with envoy(self.folder, ports, self.engines, change) as url:
                await asyncio.to_thread(load, url, connections=32, seconds=1, stream=False)  # warm
                single = await asyncio.to_thread(load, url, connections=1, seconds=self.seconds, stream=False)
                began_s = 0.0 if one is None else one.cpu_s()
                many = await asyncio.to_thread(load, url, connections=32, seconds=self.seconds, stream=False)
                used_s = 0.0 if one is None else one.cpu_s() - began_s
                return Seen({1: single, 32: many}, 1e6 * used_s / (many.requests_per_s * self.seconds))

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


def _kvatlas(port: int, engines: list[str]) -> list[str]:
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
    return ["kvatlas", "route", "--ext-proc", *named, "--port", str(port), "--api-port", "0", *chosen]


@contextmanager
def picker(module: list[str], log: Path, port: int | None = None) -> Iterator[Picker]:
    """Run a picker. ``module`` with its arguments; ``port``: where it was told to listen, else it prints its port."""
    with log.open("w+") as written:
        out = subprocess.PIPE if port is None else written
        process = subprocess.Popen(
            [sys.executable, "-m", *module], stdin=subprocess.PIPE, stdout=out, stderr=written, text=True, cwd=ROOT
        )
        try:
            if port is None:
                assert process.stdout is not None
                port = int(process.stdout.readline() or 0)
            _wait_until_it_listens(port, process, log)
            yield Picker(port, process)
        finally:
            process.terminate()
            process.wait()


def _wait_until_it_listens(port: int, process: subprocess.Popen[str], log: Path) -> None:
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise BaselineError(f"the picker does not start; the end of its log: {log.read_text(errors='replace')[-500:]}")
