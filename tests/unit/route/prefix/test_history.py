"""Routing history: the same matches as a naive model, within its bounds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.route.endpoint import EndpointName
from kvatlas.route.prefix.history import BLOCK_BYTES, ENTRY_BYTES, History
from tests.unit.route.prefix.naive import NaiveHistory

UNBOUNDED = 1 << 40
A, B, C = (EndpointName(name) for name in "abc")
prompts = st.lists(st.integers(0, 2), max_size=6)


def chain(prompt: list[int]) -> list[int]:
    """Return hashes that are equal for equal prefixes only."""
    return [hash(tuple(prompt[: end + 1])) for end in range(len(prompt))]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("record"), st.sampled_from([A, B, C]), prompts, st.integers(1, 9)),
            st.tuples(st.just("keep"), st.sets(st.sampled_from([A, B, C]))),
        ),
        max_size=40,
    ),
    st.lists(prompts, min_size=1, max_size=8),
)
def test_history_matches_as_the_naive_model_does(steps: list[tuple], asked: list[list[int]]) -> None:
    history, naive = History(UNBOUNDED), NaiveHistory()
    for step in steps:
        if step[0] == "record":
            _, endpoint, prompt, capacity = step
            history.record(endpoint, chain(prompt), capacity)
            naive.record(endpoint, prompt, capacity)
        else:
            history.keep(step[1])
            naive.held = {name: held for name, held in naive.held.items() if name in step[1]}
    for prompt in asked:
        assert history.match(chain(prompt)) == naive.match(prompt)
    stats = history.stats()
    assert stats.entries == sum(map(len, naive.held.values()))
    assert stats.blocks == len({prefix for held in naive.held.values() for prefix in held})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([A, B, C]), prompts), max_size=40), st.integers(0, 4000))
def test_the_estimate_never_exceeds_its_bound_and_all_that_went_is_counted(
    routed: list[tuple[EndpointName, list[int]]], bytes_max: int
) -> None:
    history = History(bytes_max)
    for endpoint, prompt in routed:
        history.record(endpoint, chain(prompt), 100)
        stats = history.stats()
        assert stats.bytes_estimated == stats.blocks * BLOCK_BYTES + stats.entries * ENTRY_BYTES <= bytes_max
    unbounded = History(UNBOUNDED)
    for endpoint, prompt in routed:
        unbounded.record(endpoint, chain(prompt), 100)
    assert (stats := history.stats()).evicted_capacity == 0
    assert stats.entries + stats.evicted_bytes >= unbounded.stats().entries  # some came again after they had gone


def test_an_endpoint_is_matched_up_to_its_first_gap_whatever_others_hold() -> None:
    history = History(UNBOUNDED)
    history.record(A, [1, 2, 3, 4], 100)
    history.record(B, [1, 2], 100)
    history.record(C, [2, 3, 4], 100)  # without the first block
    assert history.match([1, 2, 3, 4, 5]) == {A: 4, B: 2}
    assert history.match([]) == {}


def test_of_a_prompt_the_end_is_evicted_first() -> None:
    history = History(UNBOUNDED)
    history.record(A, [1, 2, 3], 4)
    history.record(A, [7, 8], 4)
    assert (history.match([1, 2, 3]), history.match([7, 8])) == ({A: 2}, {A: 2})
    assert history.stats().evicted_capacity == 1


def test_a_prompt_larger_than_the_cache_is_held_from_its_beginning() -> None:
    history = History(UNBOUNDED)
    history.record(A, [1, 2, 3, 4, 5], 2)
    assert history.match([1, 2, 3, 4, 5]) == {A: 2}


def test_beyond_the_bytes_the_fullest_endpoint_loses_its_oldest() -> None:
    history = History(6 * (BLOCK_BYTES + ENTRY_BYTES))
    history.record(A, [1, 2, 3, 4], 100)
    history.record(A, [10], 100)
    history.record(B, [20, 21], 100)
    assert history.match([20, 21]) == {B: 2}
    assert (history.match([1, 2, 3, 4]), history.match([10])) == ({A: 3}, {A: 1})
    assert history.stats().evicted_bytes == 1


def test_who_comes_after_one_that_left_inherits_nothing() -> None:
    history = History(UNBOUNDED)
    history.record(A, [1, 2], 100)
    history.keep({B})
    history.record(B, [1], 100)
    assert history.match([1, 2]) == {B: 1}
    assert history.stats().endpoints == 1
