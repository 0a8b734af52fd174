"""Scorers of load: llm-d's values, and what holds for any load."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.scorers.load import (
    ActiveRequestScorer,
    KvCacheUtilizationScorer,
    LoadAwareScorer,
    QueueScorer,
    RunningRequestsSizeScorer,
    TokenLoadScorer,
)
from tests.models.scoring import candidate, cycle, plugin

SCORERS: dict[Any, str] = {
    KvCacheUtilizationScorer: "kv_usage",
    QueueScorer: "waiting",
    RunningRequestsSizeScorer: "running",
    LoadAwareScorer: "waiting",
    ActiveRequestScorer: "requests",
    TokenLoadScorer: "prefill_tokens",
}
"""By what they go."""


def scores(scorer: Any, **loads: list[float]) -> list[float]:
    """Score candidates; ``loads``: a figure of each of them."""
    ((figure, values),) = loads.items()
    candidates = [candidate(str(number), **{figure: value}) for number, value in enumerate(values)]
    return list(scorer.score(cycle(candidates), candidates))


def test_kv_cache_utilization_is_what_is_free() -> None:
    assert scores(plugin(KvCacheUtilizationScorer), kv_usage=[0.0, 0.25, 1.0]) == [1.0, 0.75, 0.0]


def test_queues_are_rated_between_the_shortest_and_the_longest() -> None:
    assert scores(plugin(QueueScorer), waiting=[10, 5, 0]) == [0.0, 0.5, 1.0]
    assert scores(plugin(QueueScorer), waiting=[4, 4]) == [1.0, 1.0]


def test_running_requests_are_rated_between_the_fewest_and_the_most() -> None:
    assert scores(plugin(RunningRequestsSizeScorer), running=[2, 6, 4]) == [1.0, 0.0, 0.5]
    assert scores(plugin(RunningRequestsSizeScorer), running=[3]) == [1.0]


def test_load_aware_gives_half_to_an_empty_queue_and_nothing_at_the_threshold() -> None:
    assert scores(plugin(LoadAwareScorer, {"threshold": 10}), waiting=[2, 0, 15]) == pytest.approx([0.4, 0.5, 0.0])
    assert scores(plugin(LoadAwareScorer), waiting=[64, 128]) == [0.25, 0.0]


def test_active_requests_are_rated_against_the_most() -> None:
    assert scores(plugin(ActiveRequestScorer), requests=[3, 0, 6]) == [0.5, 1.0, 0.0]
    assert scores(plugin(ActiveRequestScorer), requests=[4, 0, 1]) == [0.0, 1.0, 0.75]


def test_up_to_the_idle_threshold_active_requests_do_not_count() -> None:
    scorer = plugin(ActiveRequestScorer, {"idleThreshold": 2, "maxBusyScore": 0.5})
    assert scores(scorer, requests=[2, 4, 8]) == [1.0, 0.25, 0.0]


def test_active_request_takes_the_parameter_that_llm_d_no_longer_looks_at() -> None:
    assert scores(plugin(ActiveRequestScorer, {"requestTimeout": "2m"}), requests=[0]) == [1.0]


def test_token_load_counts_tokens_to_be_computed_against_the_threshold() -> None:
    scorer = plugin(TokenLoadScorer, {"queueThresholdTokens": 1000})
    assert scores(scorer, prefill_tokens=[0, 250, 1000, 5000]) == [1.0, 0.75, 0.0, 0.0]
    assert scores(plugin(TokenLoadScorer), prefill_tokens=[1_048_576]) == [0.75]


def test_token_load_counts_the_uncached_tokens_of_the_request_too() -> None:
    scorer = plugin(TokenLoadScorer, {"queueThresholdTokens": 1000})
    candidates = [candidate("a", prefill_tokens=500), candidate("b", prefill_tokens=500)]
    assert scorer.score(cycle(candidates, prompt_tokens=100, held={"b": 80}), candidates) == pytest.approx([0.4, 0.48])


@pytest.mark.parametrize("type_", SCORERS)
def test_an_engine_that_never_reported_counts_as_idle(type_: Any) -> None:
    idle, silent = candidate("idle"), candidate("silent", reported=False)
    of_idle, of_silent = plugin(type_).score(cycle([idle, silent]), [idle, silent])
    assert of_idle == of_silent


@pytest.mark.parametrize(
    ("type_", "parameters"),
    [
        (LoadAwareScorer, {"threshold": 0}),
        (ActiveRequestScorer, {"maxBusyScore": 1.5}),
        (ActiveRequestScorer, {"idleThreshold": -1}),
        (TokenLoadScorer, {"queueThresholdTokens": 0}),
        (QueueScorer, {"threshold": 1}),
    ],
)
def test_parameters_that_mean_nothing_are_refused(type_: Any, parameters: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        plugin(type_, parameters)


@pytest.mark.parametrize("type_", SCORERS)
@given(data=st.data())
def test_scores_are_shares_fall_with_load_and_follow_their_candidates(type_: Any, data: st.DataObject) -> None:
    figure = SCORERS[type_]
    value: st.SearchStrategy[float] = st.floats(0, 1) if figure == "kv_usage" else st.integers(0, 10**7)
    values = data.draw(st.lists(value, min_size=1, max_size=12))
    scorer = plugin(type_)
    found = scores(scorer, **{figure: values})
    assert len(found) == len(values)
    assert all(0.0 <= score <= 1.0 for score in found)
    assert all(found[a] >= found[b] for a in range(len(values)) for b in range(len(values)) if values[a] <= values[b])
    order = data.draw(st.permutations(range(len(values))))
    assert scores(scorer, **{figure: [values[at] for at in order]}) == [found[at] for at in order]
