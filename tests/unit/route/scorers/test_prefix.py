"""What of a prompt is held: the scorer's values, and when the filter keeps only who holds it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.errors import ConfigError
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.scorers.prefix import PrefixCacheScorer
from kvatlas.route.scorers.prefix_affinity import PrefixCacheAffinityFilter
from tests.models.scoring import candidate, cycle, plugin

A, B, C = candidate("a"), candidate("b"), candidate("c")


# -- the scorer ---------------------------------------------------------------------------------------------------------


def test_the_share_of_blocks_is_the_score() -> None:
    asked = cycle([A, B, C], held={"a": 80, "b": 160})
    assert plugin(PrefixCacheScorer).score(asked, [A, B, C]) == [0.5, 1.0, 0.0]


@pytest.mark.parametrize(("block_size_tokens", "score"), [(1, 0.25125), (10, 0.375)])
def test_the_length_that_is_held_counts_by_its_weight(block_size_tokens: int, score: float) -> None:
    scorer = plugin(PrefixCacheScorer, {"matchLengthWeight": 0.5, "matchLengthScaleTokens": 100})
    asked = cycle([A], held={"a": 5 * block_size_tokens}, block_size_tokens=block_size_tokens)
    assert scorer.score(asked, [A]) == [pytest.approx(score)]


def test_beyond_the_scale_length_counts_in_full() -> None:
    scorer = plugin(PrefixCacheScorer, {"matchLengthWeight": 1, "matchLengthScaleTokens": 100})
    assert scorer.score(cycle([A], held={"a": 160}), [A]) == [1.0]


def test_nobody_has_a_score_where_no_producer_did_its_work() -> None:
    assert plugin(PrefixCacheScorer).score(cycle([A, B]), [A, B]) == [0.0, 0.0]
    assert plugin(PrefixCacheScorer).score(cycle([A], held={}, blocks=0), [A]) == [0.0]


def test_a_block_that_the_prompts_end_cuts_counts_as_one() -> None:
    assert plugin(PrefixCacheScorer).score(cycle([A], held={"a": 20}, blocks=2), [A]) == [1.0]


def test_blocks_in_a_slower_tier_count_for_what_they_are_worth() -> None:
    asked = cycle([A])
    held = {EndpointName("a"): PrefixMatch(160, MatchSource.EVENTS, worth_tokens=80)}
    asked.matches["precise"] = PrefixMatches(held, 16, 10)
    assert plugin(PrefixCacheScorer).score(asked, [A]) == [0.5]


def test_a_named_producer_is_listened_to_alone() -> None:
    scorer = plugin(PrefixCacheScorer, {"prefixMatchInfoProducerName": "precise"})
    asked = cycle([A])
    asked.matches["other"] = PrefixMatches({EndpointName("a"): PrefixMatch(160, MatchSource.HISTORY)}, 16, 10)
    assert scorer.score(asked, [A]) == [0.0]


def test_a_producer_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no plugin other"):
        plugin(PrefixCacheScorer, {"prefixMatchInfoProducerName": "other"})


def test_a_weight_without_a_scale_is_refused() -> None:
    with pytest.raises(ConfigError, match="matchLengthScaleTokens"):
        plugin(PrefixCacheScorer, {"matchLengthWeight": 0.5, "matchLengthScaleTokens": 0})
    plugin(PrefixCacheScorer, {"matchLengthScaleTokens": 0})


@pytest.mark.parametrize("parameters", [{"matchLengthWeight": 1.1}, {"hashBlockSize": 64}])
def test_parameters_of_another_plugin_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        plugin(PrefixCacheScorer, parameters)


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=12),
    st.floats(0, 1),
    st.integers(1, 10_000),
    st.randoms(use_true_random=False),
)
def test_scores_are_shares_rise_with_what_is_held_and_follow_their_candidates(
    blocks: list[int], weight: float, scale: int, shuffle: object
) -> None:
    scorer = plugin(PrefixCacheScorer, {"matchLengthWeight": weight, "matchLengthScaleTokens": scale})
    candidates = [candidate(str(number)) for number in range(len(blocks))]
    asked = cycle(candidates, held={str(number): held * 16 for number, held in enumerate(blocks)})
    found = scorer.score(asked, candidates)
    assert len(found) == len(blocks)
    assert all(0.0 <= score <= 1.0 for score in found)
    assert all(found[a] <= found[b] for a in range(len(blocks)) for b in range(len(blocks)) if blocks[a] <= blocks[b])
    order = list(range(len(blocks)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    assert scorer.score(asked, [candidates[at] for at in order]) == [found[at] for at in order]


# -- the filter ---------------------------------------------------------------------------------------------------------


def test_who_holds_most_of_the_prompt_stays() -> None:
    asked = cycle([A, B, C], held={"a": 128, "b": 160, "c": 112})
    assert list(plugin(PrefixCacheAffinityFilter).filter(asked, [A, B, C])) == [A, B]


def test_all_stay_where_nobody_holds_enough() -> None:
    assert list(plugin(PrefixCacheAffinityFilter).filter(cycle([A, B], held={"a": 112}), [A, B])) == [A, B]
    assert list(plugin(PrefixCacheAffinityFilter).filter(cycle([A, B]), [A, B])) == [A, B]


def test_all_stay_where_waiting_for_the_holder_costs_too_much() -> None:
    gate = plugin(PrefixCacheAffinityFilter, {"peakPrefillThroughput": 1000, "maxTTFTPenaltyMs": 2000})
    holder, other = candidate("a", prefill_tokens=3100), candidate("b", prefill_tokens=1000)
    asked = cycle([holder, other], held={"a": 160})
    assert list(gate.filter(asked, [holder, other])) == [holder, other]
    assert asked.notes == ["plugin: who holds the prompt would take 2100 ms longer, all candidates stay"]
    nearly = candidate("a", prefill_tokens=3000)
    assert list(gate.filter(asked, [nearly, other])) == [nearly]


def test_by_default_the_holder_may_have_18_seconds_more_to_do() -> None:
    other = candidate("b")
    asked = cycle([A, B], held={"a": 160})
    for tokens, kept in ((18 * 15_928, 1), (18 * 15_928 + 1, 2)):
        assert len(plugin(PrefixCacheAffinityFilter).filter(asked, [candidate("a", prefill_tokens=tokens), other])) == kept


def test_without_a_penalty_the_holder_stays_however_busy() -> None:
    holder = candidate("a", prefill_tokens=10**9)
    asked = cycle([holder, B], held={"a": 160})
    assert list(plugin(PrefixCacheAffinityFilter, {"maxTTFTPenaltyMs": 0}).filter(asked, [holder, B])) == [holder]


@pytest.mark.parametrize(
    ("ttfts_s", "kept"), [({"a": 3.1, "b": 1.0}, [A, B]), ({"a": 2.9, "b": 1.0}, [A]), ({"a": 9.0}, [A]), ({"b": 9.0}, [A, B])]
)
def test_predicted_times_may_decide_instead(ttfts_s: dict[str, float], kept: list[object]) -> None:
    gate = plugin(PrefixCacheAffinityFilter, {"ttftSource": "latencyPredictor", "maxTTFTPenaltyMs": 2000})
    assert list(gate.filter(cycle([A, B], held={"a": 160}, ttfts_s=ttfts_s), [A, B])) == kept


def test_without_predictions_the_holder_stays() -> None:
    gate = plugin(PrefixCacheAffinityFilter, {"ttftSource": "latencyPredictor", "maxTTFTPenaltyMs": 2000})
    assert list(gate.filter(cycle([A, B], held={"a": 160}), [A, B])) == [A]


def test_exploration_keeps_all_as_often_as_asked() -> None:
    gate = plugin(PrefixCacheAffinityFilter, {"explorationProbability": 0.25})
    asked = cycle([A, B], held={"a": 160}, seed=7)
    explored = sum(len(gate.filter(asked, [A, B])) == 2 for _ in range(4000))
    assert explored == pytest.approx(1000, abs=120)


@pytest.mark.parametrize("threshold", [0, -1])
def test_a_threshold_of_nothing_turns_the_filter_off(threshold: float) -> None:
    asked = cycle([A, B], held={"a": 160})
    assert list(plugin(PrefixCacheAffinityFilter, {"affinityThreshold": threshold}).filter(asked, [A, B])) == [A, B]


def test_a_filter_that_could_not_tell_the_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="peakPrefillThroughput"):
        plugin(PrefixCacheAffinityFilter, {"peakPrefillThroughput": 0})
    plugin(PrefixCacheAffinityFilter, {"peakPrefillThroughput": 0, "maxTTFTPenaltyMs": 0})
    plugin(PrefixCacheAffinityFilter, {"peakPrefillThroughput": 0, "ttftSource": "latencyPredictor"})


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10**6)), min_size=1, max_size=10))
def test_somebody_always_stays_and_in_order(given_: list[tuple[int, int]]) -> None:
    candidates = [candidate(str(number), prefill_tokens=tokens) for number, (_, tokens) in enumerate(given_)]
    asked = cycle(candidates, held={str(number): held * 16 for number, (held, _) in enumerate(given_)})
    kept = list(plugin(PrefixCacheAffinityFilter).filter(asked, candidates))
    assert kept
    assert kept == [one for one in candidates if one in kept]
