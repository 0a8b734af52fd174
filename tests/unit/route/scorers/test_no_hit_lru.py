"""Prompts that nobody holds go around, whoever is asked for them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.cycle import Candidate
from kvatlas.route.scorers.no_hit_lru import NoHitLruScorer
from tests.models.scoring import candidate, cycle, decide, plugin

A, B, C = candidate("a"), candidate("b"), candidate("c")


def cold(scorer: NoHitLruScorer, candidates: list[Candidate], target: Candidate, prefill: Candidate | None = None) -> None:
    """Decide for ``target`` with a prompt that nobody holds."""
    asked = cycle(candidates, held={})
    scorer.score(asked, candidates)
    scorer.decided(asked, decide(asked, target, prefill=prefill))


def scores(scorer: NoHitLruScorer, *candidates: Candidate) -> list[float]:
    return list(scorer.score(cycle(candidates, held={}), candidates))


def test_a_prompt_that_somebody_holds_is_none_of_its_business() -> None:
    assert plugin(NoHitLruScorer).score(cycle([A, B], held={"b": 16}), [A, B]) == [0.5, 0.5]


def test_those_that_never_had_one_come_first_in_their_order() -> None:
    assert scores(plugin(NoHitLruScorer), A, B, C) == [1.0, 0.5, 0.0]


def test_without_a_producer_every_prompt_is_one_that_nobody_holds() -> None:
    assert plugin(NoHitLruScorer).score(cycle([A, B]), [A, B]) == [1.0, 0.0]


def test_a_single_candidate_is_the_best() -> None:
    assert scores(plugin(NoHitLruScorer), A) == [1.0]


def test_whose_turn_is_longest_ago_comes_next() -> None:
    scorer = plugin(NoHitLruScorer)
    for target in (B, A):
        cold(scorer, [A, B, C], target)
    assert scores(scorer, A, B, C) == [0.0, 0.5, 1.0]
    cold(scorer, [A, B, C], C)
    assert scores(scorer, A, B, C) == [0.5, 1.0, 0.0]


def test_ranks_count_candidates_alone() -> None:
    scorer = plugin(NoHitLruScorer)
    for target in (A, C, B):
        cold(scorer, [A, B, C], target)
    assert scores(scorer, A, B) == [1.0, 0.0]


def test_who_computes_the_prompt_had_a_turn_too() -> None:
    scorer = plugin(NoHitLruScorer)
    cold(scorer, [A, B, C], A, prefill=B)
    assert scores(scorer, B, A, C) == [0.0, 0.5, 1.0]


def test_a_prompt_that_somebody_holds_is_no_turn() -> None:
    scorer = plugin(NoHitLruScorer)
    asked = cycle([A, B], held={"a": 16})
    scorer.score(asked, [A, B])
    scorer.decided(asked, decide(asked, A))
    assert scores(scorer, A, B) == [1.0, 0.0]


def test_a_decision_that_it_had_no_part_in_is_no_turn() -> None:
    scorer = plugin(NoHitLruScorer)
    asked = cycle([A, B])
    scorer.decided(asked, decide(asked, A))
    assert scores(scorer, A, B) == [1.0, 0.0]


def test_beyond_the_size_the_longest_ago_count_as_new() -> None:
    scorer = plugin(NoHitLruScorer, {"lruSize": 2})
    for target in (A, B, C):
        cold(scorer, [A, B, C], target)
    assert scores(scorer, C, B, A) == [0.0, 0.5, 1.0]


def test_llm_ds_old_parameters_are_taken() -> None:
    plugin(NoHitLruScorer, {"prefixPluginType": "prefix-cache-scorer", "prefixPluginName": "cache-scorer"})
    with pytest.raises(msgspec.ValidationError):
        plugin(NoHitLruScorer, {"lruSize": 0})


@given(st.integers(2, 8), st.integers(1, 40))
def test_always_taking_the_best_gives_everybody_equal_turns(endpoints: int, prompts: int) -> None:
    scorer = plugin(NoHitLruScorer)
    candidates = [candidate(str(number)) for number in range(endpoints)]
    turns = [0] * endpoints
    for _ in range(prompts):
        found = scores(scorer, *candidates)
        assert sorted(found) == pytest.approx([rank / (endpoints - 1) for rank in range(endpoints)])
        best = found.index(max(found))
        turns[best] += 1
        cold(scorer, candidates, candidates[best])
    assert max(turns) - min(turns) <= 1
