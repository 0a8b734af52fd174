"""Latency objectives: who is rated, who is preferred, and what stands in where nothing is predicted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.cycle import Candidate
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.latency import LatencyPrediction
from kvatlas.route.scorers.latency import LatencyScorer
from tests.models.scoring import candidate, cycle, plugin


def scores(
    predicted: list[tuple[float, float]],
    *,
    ttft_slo_s: float | None = None,
    tpot_slo_s: float | None = None,
    requests: list[int] | None = None,
    **parameters: Any,
) -> list[float]:
    """``predicted``: seconds to the first token and per token, by candidate; ``requests`` in flight, by default 1 each."""
    counts = requests or [1] * len(predicted)
    candidates = [candidate(str(at), requests=count) for at, count in enumerate(counts)]
    asked = cycle(candidates, ttft_slo_s=ttft_slo_s, tpot_slo_s=tpot_slo_s)
    asked.latencies["predictor"] = {EndpointName(str(at)): LatencyPrediction(*each) for at, each in enumerate(predicted)}
    return list(plugin(LatencyScorer, parameters).score(asked, candidates))


# -- with predictions ---------------------------------------------------------------------------------------------------


def test_of_those_that_meet_the_objectives_the_closest_to_them_is_preferred() -> None:
    assert scores([(0.9, 0.0), (0.5, 0.0), (0.1, 0.0)], ttft_slo_s=1.0) == [1.0, 0.51, 0.01]


def test_most_prefers_the_farthest_from_them() -> None:
    found = scores([(0.9, 0.0), (0.1, 0.0)], ttft_slo_s=1.0, headroomSelectionStrategy="most")
    assert found == [0.01, 1.0]


def test_who_misses_an_objective_has_no_score_where_somebody_meets_both() -> None:
    assert scores([(2.0, 0.0), (0.5, 0.0)], ttft_slo_s=1.0, tpot_slo_s=1.0) == [0.0, 0.51]


def test_without_objectives_the_fastest_is_preferred_whatever_the_strategy() -> None:
    for strategy in ("least", "most"):
        assert scores([(2.0, 0.0), (1.0, 0.0)], headroomSelectionStrategy=strategy) == [0.01, 1.0]


def test_where_nobody_meets_them_the_idle_alone_are_rated() -> None:
    assert scores([(1.0, 0.1), (2.0, 0.2), (3.0, 0.3)], requests=[1, 0, 0]) == [0.0, 1.0, 0.01]


def test_where_nobody_is_idle_either_the_least_severe_miss_is_rated() -> None:
    both, first_token, per_token = (2.0, 0.2), (2.0, 0.05), (0.5, 0.2)
    objectives: dict[str, Any] = {"ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
    assert scores([both, first_token, per_token], **objectives) == [0.0, 0.0, 0.51]
    assert scores([both, first_token], **objectives) == [0.0, 0.51]


def test_both_times_are_mixed_by_their_weights() -> None:
    assert scores([(1.0, 0.2), (2.0, 0.1), (2.0, 0.2)]) == [0.81, 0.2, 0.01]
    assert scores([(1.0, 0.2), (2.0, 0.1)], ttftWeight=0, tpotWeight=1) == [0.01, 1.0]


def test_a_time_that_is_the_same_everywhere_has_no_say() -> None:
    assert scores([(1.0, 0.1), (1.0, 0.2)]) == [1.0, 0.01]


def test_equal_predictions_are_rated_equally() -> None:
    assert scores([(1.0, 0.1)] * 3) == [0.51] * 3


def test_a_named_predictor_is_listened_to_alone() -> None:
    one = candidate("a", kv_usage=0.4)
    asked = cycle([one], ttfts_s={"a": 1.0})
    assert plugin(LatencyScorer, {"latencyPredictionInfoProducerName": "other"}).score(asked, [one]) == [
        0.53
    ]  # (.6 + 1 + 0) / 3


# -- without ------------------------------------------------------------------------------------------------------------


def engines() -> list[Candidate]:
    return [candidate("a", kv_usage=0.4, waiting=3), candidate("b", kv_usage=0.1, waiting=4), candidate("c", reported=False)]


def test_the_mean_of_free_cache_relative_queue_and_prefix_stands_in() -> None:
    candidates = engines()
    found = plugin(LatencyScorer).score(cycle(candidates, held={"a": 80}), candidates)
    assert found == pytest.approx([0.45, 0.30, 0.67])  # (.6 + .25 + .5) / 3, (.9 + 0 + 0) / 3, (1 + 1 + 0) / 3


def test_its_parts_have_weights() -> None:
    candidates = engines()
    asked = cycle(candidates, held={"a": 80})
    scorer = plugin(LatencyScorer, {"compositeKVWeight": 0, "compositeQueueWeight": 0, "compositePrefixWeight": 3})
    assert scorer.score(asked, candidates) == [0.5, 0.0, 0.0]
    nothing = plugin(LatencyScorer, {"compositeKVWeight": 0, "compositeQueueWeight": 0, "compositePrefixWeight": 0})
    assert nothing.score(asked, candidates) == [0.6, 0.9, 1.0]


def test_a_prediction_that_is_missing_makes_it_stand_in_for_all() -> None:
    candidates = [candidate("a", kv_usage=0.5, waiting=1), candidate("b")]
    asked = cycle(candidates, ttfts_s={"a": 0.1})
    assert plugin(LatencyScorer).score(asked, candidates) == [0.17, 0.67]


# -- always -------------------------------------------------------------------------------------------------------------

times = st.floats(0, 100)


@given(st.lists(st.tuples(times, times), min_size=1, max_size=10), times, times, st.sampled_from(["least", "most"]))
def test_scores_are_shares_somebody_has_one_and_they_follow_their_candidates(
    predicted: list[tuple[float, float]], ttft_slo_s: float, tpot_slo_s: float, strategy: str
) -> None:
    asked: dict[str, Any] = {"ttft_slo_s": ttft_slo_s, "tpot_slo_s": tpot_slo_s, "headroomSelectionStrategy": strategy}
    found = scores(predicted, **asked)
    assert len(found) == len(predicted)
    assert all(0.0 <= score <= 1.0 for score in found)
    assert max(found) > 0.0
    assert scores(predicted[::-1], **asked) == found[::-1]


@given(st.lists(times, min_size=1, max_size=10))
def test_without_objectives_longer_is_never_better(ttfts_s: list[float]) -> None:
    found = scores([(ttft_s, 0.0) for ttft_s in ttfts_s])
    pairs = [(a, b) for a in range(len(found)) for b in range(len(found)) if ttfts_s[a] <= ttfts_s[b]]
    assert all(found[a] >= found[b] for a, b in pairs)
