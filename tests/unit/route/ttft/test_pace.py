"""How answers delay each other, learnt from how long they took."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.ttft.pace import Pace


@pytest.mark.parametrize("seed", range(3))
def test_the_delay_by_one_more_request_is_found(seed: int) -> None:
    pace, rng = Pace(), random.Random(seed)
    for _ in range(1_000):
        together, tokens = rng.randint(1, 80), rng.randint(50, 350)
        pace.learn(together, tokens, tokens * (0.015 + 0.0004 * together) * rng.uniform(0.9, 1.1))
    assert pace.crowd_s == pytest.approx(200 * 0.0004, rel=0.3), f"seed {seed}"


def test_nothing_is_delayed_by_what_nobody_told_the_length_of() -> None:
    assert Pace().crowd_s == 0


@given(st.lists(st.tuples(st.floats(1, 1e4), st.integers(1, 10**6), st.floats(0, 1e6)), max_size=50))
def test_the_delay_is_never_negative_whatever_is_observed(answers: list[tuple[float, int, float]]) -> None:
    pace = Pace()
    for together, tokens, took_s in answers:
        pace.learn(together, tokens, took_s)
    assert 0 <= pace.crowd_s < float("inf")
