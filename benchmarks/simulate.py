"""How fast the fleet simulator is, and how much memory it needs; ``--ladder``: llm-d's benchmark beside its published figures.

Speed: virtual seconds per CPU second of 8 engines, each policy in a process of its own. Memory: what a run of many requests
holds at its peak, over a run of few: the trace is read as it goes, and nothing is kept of requests that are answered. What
grows at first are the index and the routing history, which are full some time after the engines' caches are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.result import Result
from benchmarks.sides import Placement
from benchmarks.sides.process import ROOT

NAME = "simulate"
POLICIES = ("random", "least-load", "llm-d-default", "llm-d-precise", "kvatlas")
SPEEDS = (("shared-prefix", {"qps": 30.0, "warm_up": ""}), ("chats", {"qps": 30.0}))
SPEED_TARGET = 1000.0
GROWTH_TARGET = 1.5

_RUN = """
import json, resource, sys, time
from kvatlas.sim.plan import Plan, run
from kvatlas.sim.presets import PRESETS
from kvatlas.sim.workloads.catalog import choose
policy, workload, parameters, limit = json.loads(sys.argv[1])
plan = Plan(policy=policy, workload=choose(workload, parameters), spec=PRESETS['qwen3-32b-2xh100'].spec, limit=limit)
began_s = time.process_time()
result = run(plan)
cpu_s = time.process_time() - began_s
peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
json.dump({"virtual_s": result.duration_s, "cpu_s": cpu_s, "peak_mb": peak_kb / 1024, "requests": result.finished}, sys.stdout)
"""


def run(*, quick: bool, place: Placement, ladder: bool = False) -> list[Result]:
    if ladder:
        from benchmarks.simulate_ladder import run_ladder

        return run_ladder(quick=quick)
    return [*_speeds(quick=quick, place=place), _memory(quick=quick, place=place)]


def _speeds(*, quick: bool, place: Placement) -> list[Result]:
    results = []
    for workload, parameters in SPEEDS[:1] if quick else SPEEDS:
        for policy in POLICIES:
            given = {**parameters, "duration_s": 20.0 if quick else 120.0}
            measured = max((_run(place, policy, workload, given) for _ in range(1 if quick else 3)), key=_speed)
            scenario = f"{workload}, 8 engines, 30 requests/s, {policy}"
            results.append(_result(scenario, _speed(measured), "virtual s/CPU s", SPEED_TARGET, at_least=True))
    return results


def _speed(measured: dict[str, float]) -> float:
    return measured["virtual_s"] / measured["cpu_s"]


def _memory(*, quick: bool, place: Placement) -> Result:
    few, many = (5_000, 20_000) if quick else (10_000, 200_000)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        _write_trace(trace, many)
        peaks = [_run(place, "kvatlas", "mooncake", {"file": str(trace)}, limit)["peak_mb"] for limit in (few, many)]
    scenario = f"peak memory at {many:,} requests ({peaks[1]:.0f} MB) over that at {few:,} ({peaks[0]:.0f} MB), kvatlas"
    return _result(scenario, peaks[1] / peaks[0], "ratio", GROWTH_TARGET, at_least=False)


def _write_trace(file: Path, requests: int) -> None:
    """Write a trace of 30 requests a second with two blocks each, the first of which is one of a thousand."""
    with file.open("w") as lines:
        for number in range(requests):
            lines.write(
                f'{{"timestamp": {number * 33}, "input_length": 1000, "output_length": 8, '
                f'"hash_ids": [{number * 7919 % 1000}, {1000 + number}]}}\n'
            )


def _run(
    place: Placement, policy: str, workload: str, parameters: dict[str, object], limit: int | None = None
) -> dict[str, float]:
    asked = json.dumps([policy, workload, parameters, limit])
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", _RUN, asked],
        env=dict(os.environ, PYTHONPATH=paths),
        stdout=subprocess.PIPE,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, place.measured),
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _result(scenario: str, value: float, unit: str, target: float, *, at_least: bool) -> Result:
    met = value >= target if at_least else value <= target
    return Result(NAME, scenario, value, unit, at_least, target=f"{'>=' if at_least else '<='} {target:g}", met=met)
