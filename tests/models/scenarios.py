"""What may happen to a fleet, as runs of it under any policy.

``python -m tests.models.scenarios`` prints the table of docs/expected-ttft.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import mean

from kvatlas.route.plugins import Services
from kvatlas.route.ttft.scorer import ExpectedTtft
from tests.models.fleet import EngineSpec, Fleet, Result, Sessions, Turn, no_reuse, shared_prefix
from tests.models.policies import History, Truth, router, scorers

OURS = "expected-ttft"
OTHERS = ("round robin", "least requests", "prefix only", "llm-d")
WORKLOADS = ("shared prefix", "multi-turn", "no reuse")
PER_S = {"shared prefix": 25.0, "multi-turn": 5.0, "no reuse": 14.0}
"""About 70 % of what four engines can do, where prefixes are reused; sessions for multi-turn."""


def fleet_of(**changes: object) -> dict[str, EngineSpec]:
    return {f"e{at}": EngineSpec(**changes) for at in range(4)}  # type: ignore[arg-type]


def one_slow(factor: float) -> dict[str, EngineSpec]:
    slow = EngineSpec(rate=8_000 / factor, step_s=0.012 * factor, tpot_s=0.02 * factor)
    return fleet_of() | {"e2": slow}


def equal_requests(fleet: Fleet, turns: list[Turn]) -> None:
    """Two bursts of 60 equal requests that nobody has seen before, at once."""
    for at, turn in enumerate((turns[len(turns) // 3], turns[len(turns) * 2 // 3])):
        first = 10**9 * (at + 1)
        turns.extend(Turn(turn.at_s, tuple(range(first, first + 60)), 40) for _ in range(60))


def other_router(fleet: Fleet, turns: list[Turn]) -> None:
    """Somebody else sends four prompts a second to one of the engines."""
    rng, at_s, name = random.Random(7), 1.0, 10**10
    end_s = max(turn.at_s for turn in turns)
    while at_s < end_s:
        blocks = tuple(range(name, name + 30))
        fleet.at(at_s, lambda blocks=blocks: fleet.elsewhere("e1", Turn(0.0, blocks, 60)))  # type: ignore[misc]
        at_s += rng.expovariate(4)
        name += 30


def new_engine(fleet: Fleet, turns: list[Turn]) -> None:
    fleet.at(turns[len(turns) // 3].at_s, lambda: fleet.join("e4", EngineSpec()))


def impatient(fleet: Fleet, turns: list[Turn]) -> None:
    """One client in five gives up after 10 to 300 ms."""
    rng = random.Random(5)
    for turn in turns:
        if rng.random() < 0.2:
            turn.gone_after_s = rng.uniform(0.01, 0.3)


@dataclass(frozen=True)
class Scenario:
    """A fleet, what finds prefixes in it, how many users there are, and what happens."""

    load: float = 1.0
    specs: Mapping[str, EngineSpec] = field(default_factory=fleet_of)
    producer: Callable[[Fleet], object] = Truth
    report_every_s: float | None = 0.05
    happens: Callable[[Fleet, list[Turn]], None] = lambda fleet, turns: None


SCENARIOS = {
    "cold start, light load": Scenario(load=0.3),
    "cold start": Scenario(),
    "saturated": Scenario(load=1.8),
    "bursts of equal requests": Scenario(load=0.7, happens=equal_requests),
    "one engine 3x slower": Scenario(load=0.7, specs=one_slow(3)),
    "one engine 10x slower": Scenario(load=0.6, specs=one_slow(10)),
    "a new engine": Scenario(load=1.1, happens=new_engine),
    "small caches": Scenario(load=0.7, specs=fleet_of(cache_blocks=600)),
    "small caches, history": Scenario(
        load=0.7, specs=fleet_of(cache_blocks=600), producer=lambda fleet: History(fleet, blocks_max=3_000)
    ),
    "events 3 s late": Scenario(load=0.7, specs=fleet_of(cache_blocks=600), producer=lambda fleet: Truth(fleet, lag_s=3.0)),
    "no reports": Scenario(report_every_s=None),
    "reports every 2 s": Scenario(report_every_s=2.0),
    "KV memory full": Scenario(load=0.7, specs=fleet_of(cache_blocks=700, slots=24, tpot_s=0.06)),
    "8 slots an engine": Scenario(load=0.6, specs=fleet_of(slots=8)),
    "traffic of another router": Scenario(load=0.6, happens=other_router),
    "clients that give up": Scenario(happens=impatient),
}


def ours(fleet: Fleet) -> dict[str, tuple[object, float]]:
    def nothing(name: str) -> object:
        raise AssertionError(name)

    services = Services(plugin=nothing, clock=lambda: fleet.now_s, random=random.Random(1))
    return {OURS: (ExpectedTtft(OURS, ExpectedTtft.Parameters(), services), 1.0)}


def play(scenario: Scenario, workload: str, policy: str, seed: int, requests: int = 500) -> Result:
    """Return what users of a scenario saw under a policy."""
    fleet = Fleet(scenario.specs, report_every_s=scenario.report_every_s)
    route = router(fleet, scenario.producer(fleet), ours(fleet) if policy == OURS else scorers(policy), seed)
    per_s = PER_S[workload] * scenario.load
    if workload == "shared prefix":
        turns = shared_prefix(seed, requests=requests, per_s=per_s)
    elif workload == "no reuse":
        turns = no_reuse(seed, requests=requests, per_s=per_s)
    else:
        sessions = Sessions(seed, sessions=requests // 6, per_s=per_s)
        fleet.next_turn, turns = sessions.next_turn, sessions.first
    scenario.happens(fleet, turns)
    return fleet.run(route, turns)


@dataclass(frozen=True)
class Seen:
    """Means over seeds."""

    mean_s: float
    p90_s: float
    hit_ratio: float

    def __str__(self) -> str:
        return f"{self.mean_s:.2f} / {self.p90_s:.2f}, {self.hit_ratio:.0%}"


def seen(scenario: Scenario, workload: str, policy: str, seeds: range, requests: int = 500) -> Seen:
    results = [play(scenario, workload, policy, seed, requests) for seed in seeds]
    return Seen(
        mean(result.mean_s for result in results),
        mean(result.p90_s for result in results),
        mean(result.hit_ratio for result in results),
    )


if __name__ == "__main__":
    print("| scenario | workload |", " | ".join((*OTHERS, OURS)), "|")
    print("|---|---|", "---|" * (len(OTHERS) + 1), sep="")
    for name, scenario in SCENARIOS.items():
        for workload in WORKLOADS:
            row = [str(seen(scenario, workload, policy, range(1, 9))) for policy in (*OTHERS, OURS)]
            print(f"| {name} | {workload} |", " | ".join(row), "|", flush=True)
