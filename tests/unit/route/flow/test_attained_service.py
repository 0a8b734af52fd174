"""Tenants who were served least go first, and what they were served fades."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from kvatlas.errors import ConfigError
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.flow.attained_service import TENANTS_MAX, ProgramAwareFairness
from kvatlas.route.flow.band import Band, BandPlan
from kvatlas.route.flow.item import Item
from kvatlas.route.flow.policies import FcfsOrdering
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.parameters import read_parameters
from kvatlas.route.picker_config import build_router, read_config
from kvatlas.route.plugins import Services
from kvatlas.route.request import RouteRequest
from tests.models.clock import Clock
from tests.unit.route.flow.fleet import SERVICES, candidate, plugin


def fairness(clock: Clock, **parameters: Any) -> ProgramAwareFairness:
    services = Services(plugin=SERVICES.plugin, clock=clock, random=random.Random(0))
    return ProgramAwareFairness("fair", read_parameters(ProgramAwareFairness.Parameters, parameters, "fair"), services)


def decision(tenant: str, tokens: int = 0) -> Decision:
    router = build_router(read_config(""))
    router.set_endpoints([candidate("a").endpoint])
    request = RouteRequest(id="r", model="m", fairness_id=tenant, prompt_tokens_estimated=tokens)
    return router.decide(request).decision


def serve(fair: ProgramAwareFairness, tenant: str, prompt: int | None, output: int | None = 0, estimated: int = 0) -> None:
    outcome = Outcome(end=End.DONE, prompt_tokens=prompt, output_tokens=output)
    fair.finished(decision(tenant, estimated), EndpointName("a"), outcome)


def heads(**arrived_s: float) -> dict[str, Item]:
    return {
        tenant: Item(id=place, priority=0, tenant=tenant, size_bytes=1, arrived_s=at)
        for place, (tenant, at) in enumerate(arrived_s.items(), 1)
    }


def test_who_was_served_least_goes_first() -> None:
    fair = fairness(Clock(0.0))
    serve(fair, "much", 1000)
    serve(fair, "some", 400, 100)
    assert fair.next_queue(heads(much=0, some=0)) == "some"
    assert fair.next_queue(heads(much=0, some=0, new=0)) == "new"


def test_an_output_token_costs_two_and_what_no_engine_told_is_estimated() -> None:
    clock = Clock(0.0)
    fair = fairness(clock)
    serve(fair, "a", 10, 5)
    serve(fair, "b", None, None, estimated=7)
    assert (fair.served("a", 0.0), fair.served("b", 0.0), fair.served("nobody", 0.0)) == (20, 7, 0)


def test_whose_request_waited_longest_goes_first_among_equals() -> None:
    clock = Clock(0.0)
    clock.now_s = 10.0
    assert fairness(clock).next_queue(heads(late=9, early=1, middle=5)) == "early"
    assert fairness(clock).next_queue(heads(first=3, second=3)) == "first"


def test_weights_say_how_much_waiting_counts() -> None:
    clock = Clock(0.0)
    waiting = fairness(clock, lasWeightService=0.2, lasWeightHeadWait=0.8)
    serve(waiting, "old", 1000)
    clock.now_s = 1.0
    assert waiting.next_queue(heads(new=1, old=0)) == "old"


@pytest.mark.parametrize(("half_life_s", "left"), [(60, 25.0), (30, 6.25), (0, 100.0)])
def test_what_was_served_fades(half_life_s: float, left: float) -> None:
    clock = Clock(0.0)
    fair = fairness(clock, lasHalfLifeSeconds=half_life_s)
    serve(fair, "a", 100)
    assert fair.served("a", 120.0) == pytest.approx(left)


def test_who_was_not_served_for_long_is_forgotten() -> None:
    clock = Clock(0.0)
    fair = fairness(clock, lasHalfLifeSeconds=0, evictionTtlSeconds=100)
    serve(fair, "gone", 100)
    clock.now_s = 50.0
    serve(fair, "stays", 100)
    clock.now_s = 101.0
    serve(fair, "new", 100)
    assert [fair.served(tenant, 101.0) for tenant in ("gone", "stays", "new")] == [0, 100, 100]


def test_tenants_are_bounded() -> None:
    fair = fairness(Clock(0.0), evictionTtlSeconds=0)
    made, outcome = decision("x"), Outcome(end=End.DONE, prompt_tokens=1)
    for number in range(TENANTS_MAX + 5):
        request = RouteRequest(id="r", model="m", fairness_id=str(number))
        fair.finished(msgspec.structs.replace(made, request=request), EndpointName("a"), outcome)
    assert [fair.served(str(number), 0.0) for number in (0, 4, 5, TENANTS_MAX + 4)] == [0, 0, 1, 1]


def test_a_band_asks_whose_turn_it_is() -> None:
    clock = Clock(0.0)
    fair = fairness(clock)
    band = Band(BandPlan(100, 100, fair, plugin(FcfsOrdering)))
    for place, tenant in enumerate(["loud", "loud", "quiet"], 1):
        band.add(Item(id=place, priority=0, tenant=tenant, size_bytes=1, arrived_s=0.0))
    serve(fair, "loud", 100)
    assert [band.pop().tenant for _ in range(3)] == ["quiet", "loud", "loud"]


@pytest.mark.parametrize("wrong", ["strategy: drr", "lasWeightService: -1", "evictionSweepSeconds: 0", "lasHalfLife: 1"])
def test_parameters_that_llmd_refuses_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"plugins\[0\]\.parameters"):
        read_config(f"{{plugins: [{{type: program-aware-fairness, parameters: {{{wrong}}}}}]}}")
