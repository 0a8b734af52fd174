"""What is learnt from first tokens, usage and reports, and how fast; what moves nothing."""

from __future__ import annotations

import random

import pytest

from kvatlas.route.load import attention_pairs
from kvatlas.route.matches import MatchSource
from kvatlas.route.ttft.learning import BUSY_MAX, Learner, Sample

REQUEST_S, TOKEN_S = 0.03, 2e-4
"""What the engines of these tests really take: other figures than those that a learner begins with."""


def observe(learner: Learner, endpoint: str, rng: random.Random, slowness: float = 1.0) -> None:
    requests, tokens = rng.randint(1, 6), rng.randint(100, 20_000)
    ttft_s = slowness * (REQUEST_S * requests + TOKEN_S * tokens) * rng.uniform(0.8, 1.25)
    learner.ttft(endpoint, Sample(ttft_s, 0.0, requests, tokens, attention_pairs(tokens, tokens)))


def warm(*endpoints: str, samples: int = 40, seed: int = 1) -> Learner:
    learner, rng = Learner(), random.Random(seed)
    for _ in range(samples):
        for endpoint in endpoints:
            observe(learner, endpoint, rng)
    return learner


def seconds(learner: Learner, endpoint: str, requests: int, tokens: int) -> float:
    costs = learner.costs
    pair_s = costs.pair_s * attention_pairs(tokens, tokens)
    return learner.traits(endpoint).slowness * (costs.request_s * requests + costs.token_s * tokens + pair_s)


@pytest.mark.parametrize("seed", range(5))
def test_a_fleet_s_figures_are_found(seed: int) -> None:
    learner = warm("a", "b", samples=200, seed=seed)
    for requests, tokens in ((1, 200), (1, 10_000), (6, 20_000)):
        truth_s = REQUEST_S * requests + TOKEN_S * tokens
        assert seconds(learner, "a", requests, tokens) == pytest.approx(truth_s, rel=0.35), f"seed {seed}"


@pytest.mark.parametrize("scale", [0.01, 100])
def test_it_does_not_matter_how_far_off_the_first_guess_is(scale: float) -> None:
    learner, rng = Learner(), random.Random(2)
    for _ in range(60):
        observe(learner, "a", rng, slowness=scale)
    assert seconds(learner, "a", 1, 10_000) == pytest.approx(scale * (REQUEST_S + TOKEN_S * 10_000), rel=0.35)


@pytest.mark.parametrize("factor", [3.0, 10.0])
def test_a_slow_engine_is_found_within_twenty_requests(factor: float) -> None:
    learner, rng = warm("a", "b", "c"), random.Random(3)
    for _ in range(20):
        observe(learner, "slow", rng, slowness=factor)
    assert learner.traits("slow").slowness / learner.traits("a").slowness > 0.7 * factor
    assert learner.typical().slowness == pytest.approx(learner.traits("a").slowness, rel=0.2)


def test_a_single_outlier_moves_little() -> None:
    learner = warm("a", "b")
    before_s = seconds(learner, "a", 1, 5_000)
    learner.ttft("a", Sample(300.0, 0.0, 1, 5_000, attention_pairs(5_000, 5_000)))
    assert seconds(learner, "a", 1, 5_000) < 1.25 * before_s
    assert seconds(learner, "b", 1, 5_000) < 1.1 * before_s


def test_an_engine_that_was_not_seen_for_long_is_believed_soon() -> None:
    learner, rng = warm("a", "b"), random.Random(4)
    for _ in range(20):
        observe(learner, "c", rng, slowness=10)
    for _ in range(100):
        observe(learner, "a", rng)
        observe(learner, "b", rng)
    for _ in range(4):
        observe(learner, "c", rng)
    assert learner.traits("c").slowness < 3 * learner.traits("a").slowness


def test_a_new_engine_begins_as_the_fleet_is() -> None:
    learner, rng = warm("a", "b"), random.Random(5)
    for _ in range(100):
        observe(learner, "a", rng, slowness=2)
        observe(learner, "b", rng, slowness=2)
    assert seconds(learner, "new", 1, 8_000) == pytest.approx(seconds(learner, "a", 1, 8_000), rel=0.15)
    assert learner.traits("new").samples == 0


def test_an_engine_that_went_is_forgotten() -> None:
    learner = warm("a", "b")
    learner.keep(["b"])
    assert not learner.knows("a")
    assert learner.traits("b").samples == 40
    assert learner.traits("a").samples == 0


def test_predictions_of_an_engine_that_evicts_are_discounted_and_those_of_others_less() -> None:
    learner = warm("a", "b")
    for _ in range(10):
        learner.cached("a", MatchSource.HISTORY, predicted=4_000, actual=400, prompt_tokens=4_200)
    assert learner.traits("a").trust[MatchSource.HISTORY] < 0.5
    assert learner.traits("b").trust[MatchSource.HISTORY] > learner.traits("a").trust[MatchSource.HISTORY]
    assert learner.traits("a").trust[MatchSource.EVENTS] == 1


def test_trust_comes_back() -> None:
    learner = warm("a")
    for actual in [0] * 20 + [4_000] * 40:
        learner.cached("a", MatchSource.HISTORY, predicted=4_000, actual=actual, prompt_tokens=4_200)
    assert learner.traits("a").trust[MatchSource.HISTORY] > 0.8


def test_what_may_be_chance_is_no_slowness() -> None:
    """Equal engines, however noisy: the fleet's own slowness is taken for each of them, nearly always."""
    learner, rng = Learner(), random.Random(6)
    differs = 0
    for _ in range(400):
        for endpoint in ("a", "b", "c", "d"):
            tokens = rng.randint(100, 20_000)
            ttft_s = (REQUEST_S + TOKEN_S * tokens) * rng.lognormvariate(0, 0.5)
            learner.ttft(endpoint, Sample(ttft_s, 0.0, 1, tokens, attention_pairs(tokens, tokens)))
            differs += not 0.8 < learner.traits(endpoint).slowness / learner.typical().slowness < 1.25
    assert differs < 0.05 * 1_600


def test_who_finds_a_queue_are_those_that_arrive_over_the_time_that_is_left_idle() -> None:
    """Half an endpoint's own, half the average: 12.5, 7.5 and 5 a second, of .02 s each."""
    learner = warm("a", "b")
    assert learner.behind_per_s(["a", "b"]) == [0, 0]
    for at in range(900):
        learner.arrived("a" if at % 4 else "b", at / 20, 0.02)
    found = learner.behind_per_s(["a", "b", "new"])
    assert found == pytest.approx([12.5 / (1 - 0.25), 7.5 / (1 - 0.15), 5 / (1 - 0.1)], rel=0.02)


def test_endpoints_that_have_more_to_do_than_they_can_are_busy_up_to_a_bound() -> None:
    learner = warm("a")
    for at in range(900):
        learner.arrived("a", at / 20, 3.0)
    assert learner.behind_per_s(["a"]) == pytest.approx([20 / (1 - BUSY_MAX)], rel=0.02)


def test_what_is_seen_behind_a_long_queue_says_little_of_an_endpoint() -> None:
    learner = warm("a", "b")
    queue_s, pairs = REQUEST_S * 60 + TOKEN_S * 60_000, 60 * attention_pairs(1_000, 1_000)
    for _ in range(10):
        learner.ttft("a", Sample(1.5 * queue_s, 0.0, 60, 60_000, pairs))
        learner.ttft("b", Sample(queue_s, 0.0, 60, 60_000, pairs))
    assert learner.traits("a").slowness / learner.traits("b").slowness < 1.2
