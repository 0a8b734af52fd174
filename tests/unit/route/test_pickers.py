"""Pickers: who is chosen, and how evenly."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.pickers import MaxScorePicker, PickerParameters, RandomPicker, SpreadPicker, WeightedRandomPicker
from kvatlas.route.plugins import Picker
from tests.unit.route.made import candidate, cycle, services

ALL = [MaxScorePicker, RandomPicker, WeightedRandomPicker, SpreadPicker]


def picker(kind: type, **parameters: object) -> Picker:
    made = kind("p", kind.Parameters(**parameters), services())  # type: ignore[attr-defined]
    assert isinstance(made, Picker)
    return made


def draws(one: Picker, totals: list[float], count: int = 3_000, requests: tuple[int, ...] = ()) -> Counter[str]:
    """Return how often each of a, b, c ... was picked first."""
    candidates = [
        candidate(chr(97 + position), requests=requests[position] if requests else 0) for position in range(len(totals))
    ]
    decision = cycle(candidates)
    return Counter(one.pick(decision, candidates, totals)[0].name for _ in range(count))


def test_the_highest_total_is_picked() -> None:
    assert draws(picker(MaxScorePicker), [0.5, 2.0, 1.9]) == {"b": 3_000}


def test_ties_spread_evenly_and_others_get_nothing() -> None:
    found = draws(picker(MaxScorePicker), [2.0, 1.0, 2.0, 2.0])
    assert found.keys() == {"a", "c", "d"}
    assert all(900 < count < 1_100 for count in found.values())


def test_further_endpoints_come_best_first() -> None:
    candidates = [candidate(name) for name in "abcd"]
    picked = picker(MaxScorePicker, max_num_of_endpoints=3).pick(cycle(candidates), candidates, [0.1, 0.4, 0.3, 0.2])
    assert [one.name for one in picked] == ["b", "c", "d"]


def test_the_random_picker_does_not_look_at_totals() -> None:
    assert all(900 < count < 1_100 for count in draws(picker(RandomPicker), [9.0, 1.0, 0.0]).values())


def test_the_weighted_random_picker_picks_in_proportion() -> None:
    found = draws(picker(WeightedRandomPicker), [3.0, 1.0, 0.0, -1.0], 8_000)
    assert found.keys() == {"a", "b"}
    assert 5_800 < found["a"] < 6_200


def test_weights_of_nothing_are_a_random_pick() -> None:
    assert all(900 < count < 1_100 for count in draws(picker(WeightedRandomPicker), [0.0, -2.0, 0.0]).values())


def test_tiny_weights_are_told_apart() -> None:
    """U^(1/total) itself is 0 for both in floating point."""
    assert 2_100 < draws(picker(WeightedRandomPicker), [3e-6, 1e-6])["a"] < 2_400


def test_of_near_ties_the_one_with_least_in_flight_is_picked() -> None:
    found = draws(picker(SpreadPicker, near_tie=0.1), [2.0, 1.85, 1.0], requests=(3, 1, 0))
    assert found == {"b": 3_000}


def test_of_near_ties_with_as_much_in_flight_anybody_is_picked() -> None:
    found = draws(picker(SpreadPicker, near_tie=0.1), [2.0, 1.85, 1.0], requests=(1, 1, 0))
    assert found.keys() == {"a", "b"}
    assert all(1_350 < count < 1_650 for count in found.values())


def test_without_near_ties_only_ties_are_spread() -> None:
    assert draws(picker(SpreadPicker, near_tie=0.0), [2.0, 1.99], requests=(50, 0)) == {"a": 3_000}


@pytest.mark.parametrize("kind", ALL)
@given(st.data())
def test_any_totals_give_distinct_candidates_and_as_many_as_asked(kind: type, data: st.DataObject) -> None:
    totals = data.draw(st.lists(st.floats(0, 100) | st.sampled_from([0.0, -1.0, 5e-324]), min_size=1, max_size=8))
    asked = data.draw(st.integers(-2, 10))
    candidates = [candidate(chr(97 + position)) for position in range(len(totals))]
    picked = picker(kind, max_num_of_endpoints=asked).pick(
        cycle(candidates, seed=random.Random(7).randrange(9)), candidates, totals
    )
    assert len({one.name for one in picked}) == len(picked) == min(len(totals), max(1, asked))


def test_zero_endpoints_are_one_as_in_llmd() -> None:
    assert PickerParameters(max_num_of_endpoints=0).count == 1
