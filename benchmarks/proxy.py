"""Requests per second and added latency of the proxy beside other routers, in front of the same engines that cost nothing.

Everything runs on this machine and shares its cores: wrk, two engines and the router under test. Ours tokenizes each prompt
with the tiny model's tokenizer and scores it precisely; the others match text by their own trees. A prompt has 6.9 KB.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.result import Result, against, percentile
from benchmarks.sides import BaselineError, Placement
from benchmarks.sides.routers import ROUTERS, canned_engines, router
from benchmarks.sides.wrk import Load, load

NAME = "proxy"
OURS = "kvatlas"
BUSY = 32
FIRST_BYTES = 300


def run(*, quick: bool, place: Placement) -> list[Result]:
    """Measure every router with one connection and with 32, streaming and not."""
    seconds = 1 if quick else 10
    seen: dict[str, dict[str, Load]] = {}
    firsts: dict[str, float] = {}
    with canned_engines(2) as engines, tempfile.TemporaryDirectory() as logs:
        direct = {name: _loads(engines[0], name, seconds) for name in _SCENARIOS}
        direct_first_s = asyncio.run(first_byte_s(engines[0]))
        for name in ROUTERS:
            try:
                with router(name, engines, Path(logs) / "log") as url:
                    load(url, connections=BUSY, seconds=1, stream=False)  # warm
                    seen[name] = {scenario: _loads(url, scenario, seconds) for scenario in _SCENARIOS}
                    firsts[name] = asyncio.run(first_byte_s(url))
            except BaselineError as error:
                if name == OURS:
                    raise
                print(f"without {name}: {error}")
    return [*_rates(seen), *_added(seen, direct), *_first_bytes(firsts, direct_first_s)]


_SCENARIOS = {"1 connection": (1, False), "32 connections": (BUSY, False), "32 connections, streaming": (BUSY, True)}


def _loads(url: str, scenario: str, seconds: int) -> Load:
    connections, stream = _SCENARIOS[scenario]
    return load(url, connections=connections, seconds=seconds, stream=stream)


def _rates(seen: dict[str, dict[str, Load]]) -> list[Result]:
    found = []
    for scenario in list(_SCENARIOS)[1:]:
        ours = seen[OURS][scenario]
        plain = scenario == "32 connections"
        text = f"{scenario}; p99 {ours.p99_s * 1e3:.1f} ms, {ours.failed} failed"
        target = ">= 3000 req/s" if plain else None
        met = ours.requests_per_s >= 3000 if plain else None
        found.append(Result(NAME, text, ours.requests_per_s, "req/s", True, target=target, met=met))
        for name, loads in seen.items():
            if name != OURS:
                theirs = loads[scenario]
                beside = f"{scenario}; theirs p99 {theirs.p99_s * 1e3:.1f} ms, {theirs.failed} failed"
                rate = theirs.requests_per_s
                found.append(against(NAME, beside, ours.requests_per_s, "req/s", name, rate, higher_is_better=True))
    return found


def _added(seen: dict[str, dict[str, Load]], direct: dict[str, Load]) -> list[Result]:
    """Return what routers add to the median of one connection, in ms."""
    base_s = direct["1 connection"].p50_s
    ours = (seen[OURS]["1 connection"].p50_s - base_s) * 1e3
    text = f"added p50, 1 connection (direct {base_s * 1e3:.3f} ms)"
    found = [Result(NAME, text, ours, "ms", False, target="<= 0.5 ms", met=ours <= 0.5)]
    for name, loads in seen.items():
        if name != OURS:
            theirs = (loads["1 connection"].p50_s - base_s) * 1e3
            found.append(against(NAME, text, ours, "ms", name, theirs, higher_is_better=False))
    return found


def _first_bytes(firsts: dict[str, float], direct_s: float) -> list[Result]:
    ours = (firsts[OURS] - direct_s) * 1e3
    text = f"added to the first event of a stream, p50 of {FIRST_BYTES} (direct {direct_s * 1e3:.3f} ms)"
    found = [Result(NAME, text, ours, "ms", False, target="<= 1 ms", met=ours <= 1)]
    for name, first_s in firsts.items():
        if name != OURS:
            found.append(against(NAME, text, ours, "ms", name, (first_s - direct_s) * 1e3, higher_is_better=False))
    return found


async def first_byte_s(url: str) -> float:
    """Return the median time from sending a streaming request to its first event, over one kept connection."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    times = []
    for number in range(FIRST_BYTES):
        prompt = f"{number % 64} " + "the fleet holds every prefix that a request may need " * 130 + str(number)
        body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 8, "stream": True}).encode()
        began = time.perf_counter()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: %d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        first = await reader.readuntil(b"data:")
        times.append(time.perf_counter() - began)
        if length := re.search(rb"content-length: *(\d+)", head, re.IGNORECASE):  # it had come as a whole
            await reader.readexactly(int(length[1]) - len(first))
        else:
            await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    return percentile(times, 0.5)
