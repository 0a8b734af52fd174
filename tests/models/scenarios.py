"""What may happen to a small fleet, as simulated runs of it under any policy.

``python -m tests.models.scenarios [seeds]`` prints the table of docs/expected-ttft.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from statistics import mean
from typing import Any

import msgspec

from kvatlas.route.picker_config import read_config
from kvatlas.serve.routing.picker import OURS as OURS_AS_SHIPPED
from kvatlas.sim.changes import Change, EngineJoins, EngineSlows
from kvatlas.sim.choice import make_engines
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.events import EventPath
from kvatlas.sim.fleet import simulate
from kvatlas.sim.plan import Plan
from kvatlas.sim.plan import workload as workload_of
from kvatlas.sim.policies import PolicyMaker, RouterPolicy
from kvatlas.sim.results import RunResult
from kvatlas.sim.workloads.catalog import choose
from kvatlas.sim.workloads.texts import Texts
from kvatlas.sim.workloads.workload import Arrival, Workload

OURS = "expected-ttft"
OTHERS = ("round robin", "least requests", "prefix only", "llm-d")
ENGINES = 4
SPEC = EngineSpec(
    costs=EngineCosts(step_s=0.012, prefill_token_s=1 / 8_000, decode_request_s=5e-5),
    gpu_blocks=4_000,
    block_size_tokens=64,
    step_tokens_max=2_048,
    running_max=64,
)

WORKLOADS: Mapping[str, tuple[str, float, Mapping[str, object]]] = {
    "shared prefix": (
        "bursts",
        25.0,
        {"prefixes": 12, "prefix_tokens": 2_560, "question_tokens": 450, "answer_tokens": 70, "burst_every_s": 1e9},
    ),
    "multi-turn": (
        "chats",
        30.0,
        {"systems": 1, "system_tokens": 512, "user_tokens": 640, "answer_tokens": 70, "think_s": 3.0},
    ),
    "no reuse": ("no-reuse", 14.0, {"prompt_tokens": 1_700, "answer_tokens": 70}),
}
"""A workload of the simulator, requests a second, and its other parameters: about 70 % of what four engines can do, where
prefixes are reused."""

_PREFIXES_ONLY = """
- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: prefixes}}
schedulingProfiles: [{name: default, plugins: [{pluginRef: prefix-cache-scorer}]}]
"""
_LLMD = """
- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: prefixes}}
- {type: queue-scorer}
- {type: kv-cache-utilization-scorer}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: prefix-cache-scorer, weight: 3}
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
"""
_EXPECTED_TTFT = """
- {type: expected-ttft-scorer, parameters: {prefixMatchInfoProducerName: prefixes}}
schedulingProfiles: [{name: default, plugins: [{pluginRef: expected-ttft-scorer}]}]
"""
_EVENTS = "{type: precise-prefix-cache-producer, name: prefixes}"
_HISTORY = """{type: approx-prefix-cache-producer, name: prefixes,
   parameters: {autoTune: false, blockSizeTokens: 64, lruCapacityPerServer: 3000}}"""


class Scenario(msgspec.Struct, frozen=True):
    """A fleet, how many users there are, what the router hears, and what happens."""

    load: float = 1.0
    parameters: Mapping[str, object] = {}
    """Of the workload, other than these."""
    spec: Mapping[str, object] = {}
    """Of engines, other than these."""
    plan: Mapping[str, Any] = {}
    """Of the run."""
    changes: Callable[[float], tuple[Change, ...]] = lambda lasts_s: ()
    bursts: bool = False
    history: bool = False
    """Prefixes are found by what was routed where, in more memory than engines have."""


def one_slow(factor: float) -> Callable[[float], tuple[Change, ...]]:
    return lambda lasts_s: (EngineSlows(0.0, 2, factor),)


SCENARIOS = {
    "cold start, light load": Scenario(load=0.3),
    "cold start": Scenario(),
    "saturated": Scenario(load=1.8),
    "bursts of equal requests": Scenario(load=0.7, bursts=True),
    "one engine 3x slower": Scenario(load=0.7, changes=one_slow(3)),
    "one engine 10x slower": Scenario(load=0.6, changes=one_slow(10)),
    "a new engine": Scenario(load=1.1, changes=lambda lasts_s: (EngineJoins(lasts_s / 3, SPEC),)),
    "small caches": Scenario(load=0.7, spec={"gpu_blocks": 600}),
    "small caches, history": Scenario(load=0.7, spec={"gpu_blocks": 600}, history=True),
    "events 3 s late": Scenario(load=0.7, spec={"gpu_blocks": 600}, plan={"event_lag_s": 3.0}),
    "no reports": Scenario(plan={"report_every_s": 1e9}),
    "reports every 2 s": Scenario(plan={"report_every_s": 2.0}),
    "KV memory full": Scenario(load=0.7, parameters={"answer_tokens": 240}, spec={"gpu_blocks": 700, "running_max": 24}),
    "8 slots an engine": Scenario(load=0.6, spec={"running_max": 8}),
    "traffic of another router": Scenario(
        load=0.6,
        plan={
            "foreign": choose("no-reuse", {"qps": 4.0, "prompt_tokens": 1_900, "answer_tokens": 60, "spread": 0.0}),
            "foreign_engines": (1,),
        },
    ),
    "clients that give up": Scenario(plan={"cancel_share": 0.2, "cancel_after_s": 0.15}),
}


class WithBursts:
    """A workload, and two bursts of 60 equal requests that nobody has seen before, each at once."""

    def __init__(self, workload: Workload, times_s: tuple[float, ...]) -> None:
        self.name = workload.name
        self._workload = workload
        self._times_s = times_s

    def arrivals(self) -> Iterator[Arrival]:
        coming = list(self._times_s)
        for arrival in self._workload.arrivals():
            while coming and coming[0] <= arrival.at_s:
                yield from _burst(coming.pop(0))
            yield arrival

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        return None if answered.session is None else self._workload.after(answered, at_s)


def _burst(at_s: float) -> Iterator[Arrival]:
    texts = Texts(int(at_s * 1_000))
    prompt, answer = texts.new(60 * 64), texts.new(40)
    return (Arrival(at_s, prompt + answer, len(prompt)) for _ in range(60))


def policy_of(name: str, *, history: bool = False) -> str | PolicyMaker:
    """Return a policy of the table for the simulator."""
    if name in ("round robin", "least requests"):
        return {"round robin": "round-robin", "least requests": "least-load"}[name]
    if name == OURS and not history:
        return from_config(name, OURS_AS_SHIPPED)
    scorers = {"prefix only": _PREFIXES_ONLY, "llm-d": _LLMD, OURS: _EXPECTED_TTFT}[name]
    producer = _HISTORY if history else _EVENTS
    head = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n- "
    return from_config(name, f"{head}{producer}{scorers}")


def from_config(name: str, config: str) -> PolicyMaker:
    """Return what makes a router policy of an EndpointPickerConfig."""
    return lambda surroundings: RouterPolicy(name, read_config(config, name), surroundings)


def plan_of(scenario: Scenario, workload: str, seed: int, requests: int) -> Plan:
    kind, per_s, parameters = WORKLOADS[workload]
    per_s *= scenario.load
    return Plan(
        policy="",
        workload=choose(kind, {**parameters, "qps": per_s, "duration_s": 1e6, **scenario.parameters}),
        spec=msgspec.structs.replace(SPEC, **scenario.spec),
        engines=ENGINES,
        seed=seed,
        limit=requests,
        changes=scenario.changes(requests / per_s),
        **scenario.plan,
    )


def play(scenario: Scenario, workload: str, policy: str, seed: int, requests: int = 500) -> RunResult:
    """Return what users of a scenario saw under a policy."""
    plan = plan_of(scenario, workload, seed, requests)
    lasts_s = requests / (WORKLOADS[workload][1] * scenario.load)
    made = workload_of(plan)
    return simulate(
        WithBursts(made, (lasts_s / 3, lasts_s * 2 / 3)) if scenario.bursts else made,
        policy_of(policy, history=scenario.history),
        [plan.spec] * plan.engines,
        seed=seed,
        engines=make_engines(),
        path=EventPath(lag_s=plan.event_lag_s),
        report_every_s=plan.report_every_s,
        changes=plan.changes,
    )


class Seen(msgspec.Struct, frozen=True):
    """Means over seeds."""

    mean_s: float
    p90_s: float
    hit_ratio: float

    def __str__(self) -> str:
        return f"{self.mean_s:.2f} / {self.p90_s:.2f}, {self.hit_ratio:.0%}"


def seen(scenario: Scenario, workload: str, policy: str, seeds: range, requests: int = 500) -> Seen:
    results = [play(scenario, workload, policy, seed, requests) for seed in seeds]
    return Seen(
        mean(result.ttft.mean for result in results),
        mean(result.ttft.p90 for result in results),
        mean(result.hit_ratio for result in results),
    )


def table(seeds: range) -> Iterator[str]:
    yield f"| scenario | workload | {' | '.join((*OTHERS, OURS))} |"
    yield "|---|---|" + "---|" * (len(OTHERS) + 1)
    for name, scenario in SCENARIOS.items():
        for workload in WORKLOADS:
            row = [str(seen(scenario, workload, policy, seeds)) for policy in (*OTHERS, OURS)]
            yield f"| {name} | {workload} | {' | '.join(row)} |"


if __name__ == "__main__":
    for line in table(range(1, 1 + int((sys.argv[1:] or ["8"])[0]))):
        print(line, flush=True)
