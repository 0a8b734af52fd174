"""Producers in a router that a configuration makes: requests go where their prefix is."""

from __future__ import annotations

import random

import pytest

from kvatlas.route.endpoint import Endpoint
from kvatlas.route.matches import MatchSource
from kvatlas.route.picker_config import build_router, read_config
from kvatlas.route.router import Flight, Router
from tests.unit.route.picker_configs import KSERVE, PRECISE
from tests.unit.route.prefix.fleet import CORES, Fleet, running_fleet
from tests.unit.route.prefix.making import endpoint, request

POOL = [endpoint(pod, address=f"10.0.0.{number}") for number, pod in enumerate("abcd")]
BLENDED = """
plugins:
- {type: blended-prefix-cache-producer}
- {type: prefix-cache-scorer}
- {type: max-score-picker}
schedulingProfiles: [{name: default, plugins: [{pluginRef: prefix-cache-scorer}, {pluginRef: max-score-picker}]}]
"""
APPROXIMATE = BLENDED.replace("blended", "approx")


def prompt(session: int, turns: int = 1) -> list[int]:
    """Return a session's prompt: each turn adds 64 tokens."""
    return [session * 10_000 + position for position in range(64 * turns + 1)]


def router(text: str, fleet: Fleet, pool: list[Endpoint] = POOL) -> Router:
    made = build_router(read_config(text), index=fleet.index, clock=fleet.clock, random=random.Random(5))
    made.set_endpoints(pool)
    return made


def decide(made: Router, tokens: list[int]) -> Flight:
    return made.decide(request(tokens))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("text", [PRECISE, KSERVE, BLENDED, APPROXIMATE], ids=["precise", "kserve", "blended", "approximate"])
def test_every_turn_of_a_session_goes_to_the_same_endpoint(core: str, text: str) -> None:
    with running_fleet(core) as fleet:
        made = router(text, fleet)
        for session in range(8):
            homes = set()
            for turns in range(1, 5):
                target = decide(made, prompt(session, turns)).decision.target
                homes.add(target.pod)
                fleet.serve(target.pod, prompt(session, turns))
            assert len(homes) == 1


@pytest.mark.parametrize("core", CORES)
def test_predictions_are_what_engines_report_as_long_as_events_come(core: str) -> None:
    """Engines with small caches evict all the time; history would not know."""
    with running_fleet(core) as fleet:
        made, draw = router(BLENDED, fleet), random.Random(7)
        for pod in "abcd":
            fleet.engine(pod).capacity = 60
            fleet.serve(pod, [9] * 4)
        for _ in range(150):
            tokens = prompt(draw.randrange(12), draw.randrange(1, 4))
            decision = decide(made, tokens).decision
            assert decision.predicted_cached_tokens == fleet.engine(decision.target.pod).cached_tokens(tokens)
            fleet.serve(decision.target.pod, tokens)


@pytest.mark.parametrize("core", CORES)
def test_sessions_stay_where_they_are_when_events_are_lost(core: str) -> None:
    with running_fleet(core) as fleet:
        made = router(BLENDED, fleet)
        for pod in "abcd":
            fleet.serve(pod, [9] * 4)
        homes = {}
        for session in range(6):  # none of these events arrives
            target = decide(made, prompt(session)).decision.target
            homes[session] = target.pod
            fleet.serve(target.pod, prompt(session), lost=True)
        for pod in "abcd":
            fleet.serve(pod, [8] * 4)  # shows that some were lost
        fleet.clock.now_s += 60  # no promise lasts that long
        for session, home in homes.items():
            decision = decide(made, prompt(session, 2)).decision
            assert decision.target.pod == home
            match = decision.matches["blended-prefix-cache-producer"].of(decision.target.name)
            assert (match.source, match.stale is not None) == (MatchSource.HISTORY, True)


def test_equal_prompts_in_a_burst_go_to_one_endpoint_before_any_event() -> None:
    with running_fleet("auto") as fleet:
        for pod in "abcd":
            fleet.serve(pod, [9] * 4)
        made = router(BLENDED, fleet)
        flights = [decide(made, prompt(1)) for _ in range(10)]
        assert len({flight.decision.target.pod for flight in flights}) == 1
