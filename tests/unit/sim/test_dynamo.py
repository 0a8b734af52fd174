"""Dynamo's cost function against the examples of its source."""

from __future__ import annotations

import math
import random
from array import array

import pytest

from kvatlas.route.outcome import End
from kvatlas.sim.policies.dynamo import ActiveBlocks, Dynamo, draw
from kvatlas.sim.policies.policy import Surroundings
from kvatlas.sim.request import Request
from tests.models.workloads import SMALL, arrival, tokens

_SIZE = 16


def policy(engines: int, **parameters: float) -> Dynamo:
    surroundings = Surroundings(clock=lambda: 0.0, random=random.Random(1), block_size_tokens=_SIZE, blocks=1_000)
    made = Dynamo(surroundings, **parameters)
    for engine in range(engines):
        made.joins(engine, SMALL)
    return made


def blocks(*names: object) -> array[int]:
    return array("Q", (hash(("block", names[: at + 1])) & (1 << 64) - 1 for at in range(len(names))))


def test_the_example_of_its_documentation() -> None:
    """docs/router/kv_cache_routing.md: 10 blocks; cached 2, 5, 8; so prefill 8, 5, 2; decode 10, 5, 9; cost 18, 10, 11."""
    made = policy(3)
    for engine, active in enumerate((10, 5, 9)):
        made._active.counts[engine] = active - 10  # there, the prompt's own blocks are among them
    costs = made.costs(blocks(*range(10)), 10 * _SIZE, {0: 2, 1: 5, 2: 8})
    assert costs == {0: 18.0, 1: 10.0, 2: 11.0}
    assert draw(costs, 0.0, random.Random(1)) == 1


def test_prompts_without_a_first_token_count_as_prefill() -> None:
    made = policy(1, prefill_load_scale=2.0)
    asked = arrival(0.0, tokens("a", 100))
    request = Request(1, asked, 0.0, blocks(*range(6)), 6)
    request.engine = made.choose(request)
    # 2 * (100 + 64) / 16 blocks to compute, 6 in flight and 4 of its own
    assert made.costs(blocks("b", "c", "d", "e"), 64, {}) == {0: 2 * 164 / 16 + 6 + 4}
    made.first_token(request, 0.1)
    assert made.costs(blocks("b", "c", "d", "e"), 64, {}) == {0: 2 * 64 / 16 + 6 + 4}
    assert made.costs(blocks(0, 1, "d", "e"), 64, {}) == {0: 2 * 64 / 16 + 6 + 2}  # blocks in flight are shared
    made.ended(request, 0.2, End.DONE)
    assert made.costs(blocks("b", "c", "d", "e"), 64, {}) == {0: 2 * 64 / 16 + 4}


def test_a_credit_below_one_believes_caches_less() -> None:
    made = policy(2, overlap_score_credit=0.5)
    assert made.costs(blocks(*range(4)), 64, {0: 4}) == {0: 2.0 + 4, 1: 4.0 + 4}


def test_equal_costs_are_spread() -> None:
    rng = random.Random(2)
    drawn = [draw({4: 1.0, 5: 1.0, 6: 1.5}, 0.0, rng) for _ in range(300)]
    assert 100 < drawn.count(4) < 200
    assert 6 not in drawn


def test_temperature_draws_from_costs_scaled_to_their_range() -> None:
    """softmax of -cost / ((max - min) * temperature): here weights e^0, e^-0.5, e^-1."""
    rng = random.Random(2)
    drawn = [draw({0: 10.0, 1: 15.0, 2: 20.0}, 1.0, rng) for _ in range(20_000)]
    weights = [math.exp(-0.5 * engine) for engine in range(3)]
    for engine, weight in enumerate(weights):
        assert drawn.count(engine) / len(drawn) == pytest.approx(weight / sum(weights), abs=0.015)
    assert {draw({0: 3.0, 1: 3.0}, 0.7, rng) for _ in range(50)} == {0, 1}


def test_blocks_in_flight_equal_a_count_of_each() -> None:
    rng = random.Random(8)
    active = ActiveBlocks()
    truth: dict[int, list[array[int]]] = {}
    for engine in range(3):
        active.counts[engine] = 0
        truth[engine] = []
    for _ in range(600):
        engine = rng.randrange(3)
        if truth[engine] and rng.random() < 0.5:
            active.remove(engine, truth[engine].pop(rng.randrange(len(truth[engine]))))
        else:
            prompt = blocks(*(rng.randrange(2) for _ in range(rng.randrange(0, 9))))
            active.add(engine, prompt)
            truth[engine].append(prompt)
        asked = blocks(*(rng.randrange(2) for _ in range(6)))
        shared = active.shared(asked)
        for one, prompts in truth.items():
            held = {key for prompt in prompts for key in prompt}
            assert active.counts[one] == len(held)
            assert shared.get(one, 0) == sum(key in held for key in asked)
    for engine, prompts in truth.items():
        for prompt in prompts:
            active.remove(engine, prompt)
    assert not list(active._tree.nodes())
