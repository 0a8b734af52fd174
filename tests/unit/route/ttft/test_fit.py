"""What each of several amounts costs, from noisy observations of sums."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.ttft.fit import Fit

MEMORY = 64
GUESS = (0.02, 1e-4, 3e-9)
"""Seconds a request, a token, a pair of tokens."""


def learn(fit: Fit, amounts: tuple[float, ...], observed_s: float) -> None:
    fit.learn(amounts, math.log(observed_s / fit.of(amounts)), MEMORY)


def total_s(figures: tuple[float, ...], amounts: tuple[float, ...]) -> float:
    return sum(figure * amount for figure, amount in zip(figures, amounts, strict=True))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("figures", [(0.012, 1.7e-3), (0.2, 1e-5), (0.02, 1e-4)])
def test_two_figures_are_told_apart(figures: tuple[float, float], seed: int) -> None:
    fit, rng = Fit(GUESS[:2]), random.Random(seed)
    for _ in range(300):
        amounts = float(rng.randint(1, 4)), rng.lognormvariate(5, 1.5)
        learn(fit, amounts, total_s(figures, amounts) * rng.lognormvariate(0, 0.2))
    for amounts in ((1.0, 20.0), (1.0, 2_000.0), (4.0, 400.0)):
        assert fit.of(amounts) == pytest.approx(total_s(figures, amounts), rel=0.35), f"seed {seed}"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("figures", [(0.02, 1e-4, 3e-9), (0.02, 1e-4, 2e-8), (0.02, 2e-5, 1e-12)])
def test_what_grows_with_the_square_is_told_from_what_grows_with_the_length(figures: tuple[float, ...], seed: int) -> None:
    fit, rng = Fit(GUESS), random.Random(seed)
    for _ in range(400):
        tokens = rng.lognormvariate(8.5, 1.5)
        learn(fit, (1.0, tokens, tokens**2 / 2), total_s(figures, (1.0, tokens, tokens**2 / 2)) * rng.lognormvariate(0, 0.2))
    for tokens in (500.0, 5_000.0, 50_000.0):
        expected_s = total_s(figures, (1.0, tokens, tokens**2 / 2))
        assert fit.of((1.0, tokens, tokens**2 / 2)) == pytest.approx(expected_s, rel=0.4), f"seed {seed}"


def test_what_always_comes_in_the_same_proportion_is_learnt_as_a_sum() -> None:
    fit = Fit(GUESS[:2])
    for _ in range(300):
        learn(fit, (1.0, 1_000.0), 0.36)
    assert fit.of((1.0, 1_000.0)) == pytest.approx(0.36, rel=0.01)
    assert fit.figures[0] > 0.01


def test_an_amount_that_never_comes_keeps_its_figure() -> None:
    fit = Fit(GUESS)
    for _ in range(300):
        learn(fit, (1.0, 0.0, 0.0), 0.03)
    assert fit.figures == pytest.approx([0.03, *GUESS[1:]], rel=0.01)


amounts = st.tuples(st.floats(1, 100), st.floats(1, 1e6), st.floats(1, 1e12))


@given(st.lists(st.tuples(amounts, st.floats(-2, 2)), max_size=60))
def test_figures_stay_positive_whatever_is_observed(observed: list[tuple[tuple[float, float, float], float]]) -> None:
    fit = Fit(GUESS)
    for given_amounts, error in observed:
        fit.learn(given_amounts, error, MEMORY)
        assert all(0 < figure < math.inf for figure in fit.figures)
