"""expected-ttft in a fleet on a virtual clock, next to published policies: ahead or equal in mean and p90, whatever happens.

Margins are for chance: few seeds, so that it is fast. docs/expected-ttft.md has the same with more of them.
"""

from __future__ import annotations

from functools import cache

import pytest

from kvatlas.route.endpoint import EndpointName
from kvatlas.route.matches import MatchSource
from kvatlas.route.router import Router
from kvatlas.route.ttft.scorer import TRIAL_EVERY, ExpectedTtft, Forecast
from tests.models.fleet import EngineSpec, Fleet, Turn, no_reuse, shared_prefix
from tests.models.policies import History, Truth, router
from tests.models.replay import CASES, replay
from tests.models.replay import WORKLOADS as WORKLOADS_LIVE
from tests.models.scenarios import OURS, SCENARIOS, WORKLOADS, Seen, fleet_of, one_slow, ours, play, seen

SEEDS = range(1, 4)
MEAN_MARGIN, P90_MARGIN = 1.05, 1.2


@cache
def played(scenario: str, workload: str, policy: str) -> Seen:
    return seen(SCENARIOS[scenario], workload, policy, SEEDS, 400)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nobody_is_ahead(scenario: str, workload: str) -> None:
    of_ours = played(scenario, workload, OURS)
    policies = ("least requests", "llm-d", *(["prefix only", "round robin"] if workload == "shared prefix" else []))
    others = {policy: played(scenario, workload, policy) for policy in policies}
    told = f"seeds {SEEDS}: ours {of_ours}; " + "; ".join(f"{policy} {one}" for policy, one in others.items())
    assert of_ours.mean_s <= MEAN_MARGIN * min(one.mean_s for one in others.values()), told
    assert of_ours.p90_s <= P90_MARGIN * min(one.p90_s for one in others.values()), told


@pytest.mark.parametrize(
    ("scenario", "workload", "policy", "ratio"),
    [
        ("cold start", "multi-turn", "llm-d", 0.85),
        ("cold start", "no reuse", "llm-d", 0.92),
        ("cold start", "shared prefix", "least requests", 0.6),
        ("one engine 10x slower", "shared prefix", "llm-d", 0.7),
        ("one engine 3x slower", "no reuse", "least requests", 0.75),
        ("no reports", "multi-turn", "llm-d", 0.3),
        ("8 slots an engine", "shared prefix", "prefix only", 0.3),
        ("traffic of another router", "shared prefix", "llm-d", 0.5),
    ],
)
def test_it_is_well_ahead_where_others_do_not_look(scenario: str, workload: str, policy: str, ratio: float) -> None:
    of_ours, other = played(scenario, workload, OURS), played(scenario, workload, policy)
    assert of_ours.mean_s < ratio * other.mean_s, f"seeds {SEEDS}: ours {of_ours}, {policy} {other}"


def made(fleet: Fleet, producer: object, seed: int = 1) -> tuple[ExpectedTtft, Router]:
    by_name = ours(fleet)
    scorer = by_name[OURS][0]
    assert isinstance(scorer, ExpectedTtft)
    return scorer, router(fleet, producer, by_name, seed)


def share(names: list[str], name: str) -> float:
    return names.count(name) / len(names)


def test_a_slow_engine_gets_less_than_its_part_of_new_prompts_and_its_slowness_is_known() -> None:
    fleet = Fleet(one_slow(10))
    scorer, route = made(fleet, Truth(fleet))
    fleet.run(route, no_reuse(1, requests=600, per_s=8))
    slow, normal = scorer.learner.traits("e2"), scorer.learner.traits("e0")
    assert slow.slowness > 5 * normal.slowness
    last = [engine for _, engine, _ in sorted(fleet.result.arrivals)[300:]]
    assert share(last, "e2") < 0.06


def test_an_engine_that_was_slow_is_used_again_when_it_is_not() -> None:
    fleet = Fleet(one_slow(10))
    turns = no_reuse(1, requests=2_400, per_s=10)

    def recovers() -> None:
        fleet.engines[EndpointName("e2")].spec = EngineSpec()

    fleet.at(turns[600].at_s, recovers)
    _, route = made(fleet, Truth(fleet))
    fleet.run(route, turns)
    sent = [engine for _, engine, _ in sorted(fleet.result.arrivals)]
    assert share(sent[300:600], "e2") < 0.08
    assert share(sent[-600:], "e2") > 0.15


def test_an_engine_that_gets_slow_is_left_within_tens_of_requests() -> None:
    fleet = Fleet(fleet_of())
    turns = no_reuse(2, requests=900, per_s=10)

    def degrades() -> None:
        fleet.engines[EndpointName("e1")].spec = EngineSpec(rate=1_000.0, step_s=0.1)

    fleet.at(turns[300].at_s, degrades)
    _, route = made(fleet, Truth(fleet))
    fleet.run(route, turns)
    sent = [engine for _, engine, _ in sorted(fleet.result.arrivals)]
    assert sent[300:450].count("e1") < 30
    assert share(sent[-300:], "e1") < 0.08


def test_trials_are_a_bounded_share() -> None:
    fleet = Fleet(one_slow(10))
    _, route = made(fleet, Truth(fleet))
    fleet.run(route, no_reuse(3, requests=800, per_s=9))
    tried = 0
    for logged in route.log.last(800):
        run = logged.decision.runs["default"]
        assert run is not None
        explained = run.ratings[0].explained
        assert isinstance(explained, Forecast)
        tried += explained.tried == logged.decision.target.name
    assert 2 <= tried <= 800 / TRIAL_EVERY


def test_a_new_engine_gets_its_part_of_new_prompts_at_once() -> None:
    """In tokens: it gets the long prompts first, since nobody waits behind them there."""
    fleet = Fleet(fleet_of())
    turns = no_reuse(1, requests=600, per_s=15)
    fleet.at(turns[200].at_s, lambda: fleet.join("e4", EngineSpec()))
    _, route = made(fleet, Truth(fleet))
    fleet.run(route, turns)
    last = [logged.decision for logged in route.log.last(600)][::-1][200:400]
    tokens = [decision.request.prompt_tokens * (decision.target.name == "e4") for decision in last]
    assert sum(tokens) > 0.2 * sum(decision.request.prompt_tokens for decision in last)


def test_a_new_engine_gets_copies_of_prefixes_when_waiting_for_their_holders_costs_more() -> None:
    fleet = Fleet(fleet_of())
    turns = shared_prefix(1, requests=1_200, per_s=45)
    fleet.at(turns[200].at_s, lambda: fleet.join("e4", EngineSpec()))
    _, route = made(fleet, Truth(fleet))
    fleet.run(route, turns)
    assert share([engine for _, engine, _ in sorted(fleet.result.arrivals)[600:]], "e4") > 0.04


def test_a_burst_of_equal_requests_uses_the_fleet_without_a_copy_each() -> None:
    fleet = Fleet(fleet_of())
    _, route = made(fleet, Truth(fleet))
    prompt = tuple(range(100))
    result = fleet.run(route, [Turn(1.0, (*prompt, 10_000 + at), 40) for at in range(200)])
    assert len(result.by_engine) >= 2
    assert max(result.by_engine.values()) < 140
    assert result.hit_ratio > 0.95


def test_an_engine_that_evicts_what_history_remembers_is_believed_less() -> None:
    fleet = Fleet(fleet_of(cache_blocks=120))
    scorer, route = made(fleet, History(fleet, blocks_max=6_000))
    fleet.run(route, shared_prefix(1, requests=400, per_s=12, groups=30))
    assert all(scorer.learner.traits(f"e{at}").trust[MatchSource.HISTORY] < 0.8 for at in range(4))
    assert scorer.learner.typical().trust[MatchSource.EVENTS] == 1


def test_equal_seeds_play_equally() -> None:
    results = [play(SCENARIOS["cold start"], "shared prefix", OURS, 5, 200) for _ in range(2)]
    assert results[0].ttfts_s == results[1].ttfts_s


def test_on_replayed_chats_it_is_faster_than_a_sticky_policy_and_hits_nearly_as_often() -> None:
    for workload in WORKLOADS_LIVE:
        seen_of = {policy: [replay(workload, policy, seed) for seed in SEEDS] for policy in (OURS, "cache aware")}
        for case in CASES:
            of_ours, sticky = ([one[case.name] for one in seen_of[policy]] for policy in (OURS, "cache aware"))
            told = f"{workload.name} {case.name}, seeds {SEEDS}: ours {of_ours}, cache aware {sticky}"
            assert sum(one.mean_s for one in of_ours) < 1.03 * sum(one.mean_s for one in sticky), told
            assert (
                sum(one.hit_ratio for one in of_ours) / len(SEEDS) > sum(one.hit_ratio for one in sticky) / len(SEEDS) - 0.03
            ), told
