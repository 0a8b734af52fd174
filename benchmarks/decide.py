"""What routing a request costs a router's process, by stage. CPU time in microseconds, sockets and tokenizing left out.

Baseline: the same without the native core, in the same run: keys, index, hashes and history in Python. A request is what
:mod:`benchmarks.sides.deciding` says.
"""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from benchmarks.result import Result, against
from benchmarks.sides import Placement, WorkerError
from benchmarks.sides.process import ROOT

NAME = "decide"
BASELINE = "pure Python"
AIM_US = {2: 150.0, 8: 250.0}
"""Of all stages, by endpoints."""

_WITHOUT_NATIVE = "import sys; sys.modules['kvatlas._native'] = None\n"
_MEASURE = "from benchmarks.sides.deciding import main; main({endpoints}, {batches})"


def run(*, quick: bool, place: Placement) -> list[Result]:
    results = []
    for endpoints in (2, 8, 64):
        ours = _us_by_stage(_MEASURE, endpoints, 40 if quick else 200, place)
        python = _us_by_stage(_WITHOUT_NATIVE + _MEASURE, endpoints, 4 if quick else 20, place)
        for stage, us in ours.items():
            what = f"{endpoints} endpoints, {stage}"
            results.append(against(NAME, what, us, "us", BASELINE, python[stage], higher_is_better=False))
        whole = against(
            NAME,
            f"{endpoints} endpoints, all",
            sum(ours.values()),
            "us",
            BASELINE,
            sum(python.values()),
            higher_is_better=False,
        )
        if (aim_us := AIM_US.get(endpoints)) is not None:
            whole.target, whole.met = f"<= {aim_us:g} us", whole.value <= aim_us
        results.append(whole)
    return results


def _us_by_stage(code: str, endpoints: int, batches: int, place: Placement) -> dict[str, float]:
    """Measure in a process of its own, so that what is imported there is what is measured."""
    os.sched_setaffinity(0, place.measured)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", code.format(endpoints=endpoints, batches=batches)],
        stdout=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths)),
        check=False,
    )
    if done.returncode:
        raise WorkerError(f"what measures decisions ended with status {done.returncode}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=dict[str, float])
