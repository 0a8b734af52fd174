"""Light policies spread requests as they should."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import pytest

from kvatlas.errors import ConfigError
from kvatlas.route.outcome import End
from kvatlas.sim.policies import Policy, Surroundings, make_policy
from kvatlas.sim.request import Request
from tests.models.workloads import SMALL, arrival, tokens


def policy(name: str, engines: int) -> Policy:
    surroundings = Surroundings(clock=lambda: 0.0, random=random.Random(4), block_size_tokens=16, blocks=1_000)
    made = make_policy(name, surroundings)
    for engine in range(engines):
        made.joins(engine, SMALL)
    return made


def sent(made: Policy, count: int) -> list[Request]:
    requests = []
    for number in range(count):
        request = Request(number, arrival(0.0, tokens(0, 20)), 0.0, array("Q"), 1)
        request.engine = made.choose(request)
        requests.append(request)
    return requests


def engines(requests: list[Request]) -> Counter[int]:
    return Counter(request.engine for request in requests)


def test_random_is_even_in_the_long_run() -> None:
    counts = engines(sent(policy("random", 4), 4_000))
    assert all(900 < counts[engine] < 1_100 for engine in range(4))


def test_round_robin_takes_turns() -> None:
    made = policy("round-robin", 3)
    assert [request.engine for request in sent(made, 7)] == [0, 1, 2, 0, 1, 2, 0]
    made.leaves(1)
    assert [request.engine for request in sent(made, 3)] == [2, 0, 2]


def test_least_load_fills_what_was_freed() -> None:
    made = policy("least-load", 4)
    requests = sent(made, 40)
    assert set(engines(requests).values()) == {10}
    for request in requests[:8]:
        made.ended(request, 0.0, End.DONE)
    freed = engines(requests[:8])
    assert engines(sent(made, 8)) == freed


def test_power_of_two_never_picks_the_fullest() -> None:
    made = policy("power-of-two", 4)
    counts = engines(sent(made, 400))
    assert max(counts.values()) - min(counts.values()) < 8
    made.loads[2] = 10_000  # type: ignore[attr-defined]
    assert engines(sent(made, 100))[2] == 0


def test_power_of_two_of_one_engine_is_that_one() -> None:
    assert engines(sent(policy("power-of-two", 1), 5)) == {0: 5}


def test_an_unknown_policy_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="power-of-two"):
        policy("best", 1)
