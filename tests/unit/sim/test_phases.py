"""Parts of a workload are told of by themselves, and add up to the whole."""

from __future__ import annotations

import msgspec

from kvatlas.sim.fleet import simulate
from kvatlas.sim.reference import ReferenceEngines
from kvatlas.sim.results import RunResult
from kvatlas.sim.workloads.workload import Arrival
from tests.models.workloads import SMALL, Given, shared_prefixes


def run(arrivals: list[Arrival]) -> RunResult:
    return simulate(Given(arrivals), "least-load", [SMALL] * 2, seed=0, engines=ReferenceEngines())


def in_phase(arrivals: list[Arrival], phase: str, later_s: float) -> list[Arrival]:
    return [msgspec.structs.replace(one, phase=phase, at_s=one.at_s + later_s) for one in arrivals]


def test_phases_add_up_and_last_from_their_first_arrival_to_their_last_answer() -> None:
    arrivals = list(shared_prefixes(1, requests=30, per_s=20.0).arrivals())
    result = run(in_phase(arrivals, "slow", 0.0) + in_phase(arrivals, "again", 1000.0))
    first, second = result.phases
    assert [(phase.name, phase.arrived, phase.finished) for phase in result.phases] == [("slow", 30, 30), ("again", 30, 30)]
    assert (first.from_s, second.from_s) == (arrivals[0].at_s, 1000.0 + arrivals[0].at_s)
    assert second.from_s + second.duration_s == arrivals[0].at_s + result.duration_s
    assert first.duration_s < 100
    assert first.output_tokens + second.output_tokens == result.output_tokens
    assert first.cached_tokens + second.cached_tokens == result.cached_tokens
    assert second.hit_ratio > first.hit_ratio
    assert first.ttft.count + second.ttft.count == result.ttft.count


def test_a_workload_without_phases_has_none() -> None:
    assert run(list(shared_prefixes(1, requests=5, per_s=20.0).arrivals())).phases == ()
