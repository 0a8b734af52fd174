"""Results of runs that nobody ran, for what shows them."""

from __future__ import annotations

from typing import Any

from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.plan import Plan
from kvatlas.sim.results import EngineResult, Moment, PhaseResult, RunResult, Spread
from kvatlas.sim.workloads.catalog import choose

SPEC = EngineSpec(costs=EngineCosts(step_s=0.02, prefill_token_s=1e-4), gpu_blocks=2000)


def spread(p50: float) -> Spread:
    return Spread(count=100, mean=p50, p50=p50, p90=2 * p50, p99=3 * p50, max=4 * p50)


def engine_result(number: int, tokens: int) -> EngineResult:
    return EngineResult(
        name=f"engine-{number}",
        requests=50,
        prompt_tokens=tokens,
        cached_tokens=tokens // 2,
        output_tokens=1000,
        busy=0.5,
        waiting_mean=1.5,
        running_mean=3.0,
        kv_usage_mean=0.4,
        preemptions=0,
    )


def run_result(policy: str, ttft_s: float = 0.1, **given: Any) -> RunResult:
    fields: dict[str, Any] = {
        "workload": "chats",
        "seed": 3,
        "engines": tuple(engine_result(number, 10_000 + 1000 * number) for number in range(4)),
        "arrived": 200,
        "finished": 200,
        "duration_s": 100.0,
        "prompt_tokens": 46_000,
        "cached_tokens": 23_000,
        "output_tokens": 4_000,
        "ttft": spread(ttft_s),
        "tpot": spread(0.02),
        "queue": spread(ttft_s / 2),
        "moments": tuple(moment(float(at), waiting=at % 7) for at in range(0, 100, 5)),
    }
    return RunResult(policy=policy, **{**fields, **given})


def moment(from_s: float, waiting: int) -> Moment:
    return Moment(
        from_s=from_s, arrived=10, finished=10, ttft_mean_s=0.1, cached_share=0.5, waiting=waiting, running=4, output_tokens=200
    )


def phase(name: str, output_tokens: int, ttft_s: float = 0.1) -> PhaseResult:
    return PhaseResult(
        name=name,
        from_s=0.0,
        duration_s=10.0,
        arrived=20,
        finished=20,
        prompt_tokens=2000,
        cached_tokens=1000,
        output_tokens=output_tokens,
        ttft=spread(ttft_s),
    )


def planned(result: RunResult) -> tuple[Plan, RunResult]:
    plan = Plan(policy=result.policy, workload=choose("chats", {}), spec=SPEC, engines=4, seed=3, label=result.label)
    return plan, result
