"""llm-d's shared-prefix ladder, simulated, beside what llm-d measured: 8 pods, Qwen3-32B, 307,328 KV tokens each.

Source of the baseline: llm-d-kv-cache's report "X-70R-6kSys" (benchmarking/73-capacity/README.md), its summary across request
rates. Its output tokens/s are the mean over the stages without the warm-up, and so are ours; its p90 of the time to first
token is the mean over the same stages, weighted by the requests that were answered, and so is ours.

From 40 requests a second on only 1,024 requests of each stage were answered there: with these weights, and no others, the
stages' figures give the summary's to the last digit. 1,024 open requests are Envoy's default bound; who came beyond it failed
at once, and is neither in the tokens nor in the times. Here too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.result import Result, against
from kvatlas.sim.batch import outcomes
from kvatlas.sim.comparison import throughput
from kvatlas.sim.plan import Plan
from kvatlas.sim.presets import PRESETS
from kvatlas.sim.results import PhaseResult, RunResult
from kvatlas.sim.workloads.catalog import choose
from kvatlas.sim.workloads.shared_prefix import WARM_UP

NAME = "simulate"
PRESET = "qwen3-32b-2xh100"
CONFIGS = Path(__file__).parent / "ladder"
IN_FLIGHT_MAX = 1024
QUICK_STAGES = "15:20 40:38"


class Published(msgspec.Struct, frozen=True):
    """What llm-d measured of one policy."""

    output_tokens_per_s: float
    ttft_p90_s: float


PRECISE = Published(8730.0, 0.542)
PUBLISHED = {
    str(CONFIGS / "llm-d-precise.yaml"): PRECISE,
    str(CONFIGS / "llm-d-estimated.yaml"): Published(6944.4, 31.083),
    str(CONFIGS / "llm-d-random.yaml"): Published(4428.7, 92.551),
    str(CONFIGS / "llm-d-load.yaml"): Published(4266.4, 94.865),
    "kvatlas": PRECISE,  # nothing is published of ours: beside the best
}
"""By policy. llm-d's are the published configurations, as they are written now."""


def run_ladder(*, quick: bool) -> list[Result]:
    """Run it, each policy in a process of its own; ``quick``: two of its sixteen stages, which have no published summary."""
    workload = choose("shared-prefix", {"stages": QUICK_STAGES} if quick else {})
    spec = PRESETS[PRESET].spec
    plans = [Plan(policy=each, workload=workload, spec=spec, engines=8, in_flight_max=IN_FLIGHT_MAX) for each in PUBLISHED]
    found = {outcome.plan.policy: outcome for outcome in outcomes(plans, os.cpu_count() or 1)}
    results = []
    for policy, published in PUBLISHED.items():
        result, problem = found[policy].result, found[policy].problem
        if result is None:
            raise SystemExit(f"benchmarks simulate: {policy}: {problem}")
        results += _compared(result, published, quick=quick)
    return results


def _compared(result: RunResult, published: Published, *, quick: bool) -> list[Result]:
    what = "llm-d precise, published" if result.policy == "kvatlas" else "published by llm-d"
    figures = (
        ("output tokens/s", throughput(result), "tokens/s", published.output_tokens_per_s, True),
        ("TTFT p90", _ttft_p90_s(result.phases), "s", published.ttft_p90_s, False),
    )
    results = []
    for name, value, unit, baseline, higher in figures:
        scenario = f"ladder, {result.policy}: {name}"
        if quick:
            results.append(Result(NAME, f"{scenario}, stages {QUICK_STAGES}", value, unit, higher))
        else:
            results.append(against(NAME, scenario, value, unit, what, baseline, higher_is_better=higher))
    return results


def _ttft_p90_s(phases: Sequence[PhaseResult]) -> float:
    counted = [phase for phase in phases if phase.name != WARM_UP]
    return sum(phase.ttft.p90 * phase.finished for phase in counted) / sum(phase.finished for phase in counted)
