"""Load by wrk: requests per second and latencies of one address."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import msgspec

from benchmarks.sides.install import BaselineError

SCRIPT = Path(__file__).with_name("completions.lua")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


class Load(msgspec.Struct, frozen=True):
    """What wrk saw. Latencies in seconds, to the end of each answer."""

    requests_per_s: float
    p50_s: float
    p99_s: float
    failed: int
    """Answers other than 2xx and 3xx, and broken connections."""


def load(url: str, *, connections: int, seconds: int, stream: bool) -> Load:
    """Send completions of 6.9 KB prompts over so many connections. Raises BaselineError where wrk is not there."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise BaselineError("wrk is not installed; apt-get install wrk")
    command = [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "--latency", "-s", str(SCRIPT)]
    ran = subprocess.run(
        [*command, f"{url}/v1/completions", "--", "stream" if stream else "whole"], capture_output=True, text=True, check=True
    )
    return _read(ran.stdout)


def _read(text: str) -> Load:
    failed = sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", text)))
    failed += sum(int(number) for line in re.findall(r"Socket errors: (.*)", text) for number in re.findall(r"\d+", line))
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert rate is not None, text
    return Load(float(rate[1]), _time(text, "50%"), _time(text, "99%"), failed)


def _time(text: str, percent: str) -> float:
    found = re.search(rf"{percent}\s+([\d.]+)(us|ms|s|m)\b", text)
    assert found is not None, text
    return float(found[1]) * _SECONDS[found[2]]
