"""Seconds a request and a token, from noisy observations."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.ttft.fit import Fit

MEMORY = 64


def learn(fit: Fit, requests: float, tokens: float, observed_s: float) -> None:
    fit.learn(requests, tokens, math.log(observed_s / fit.of(requests, tokens)), MEMORY)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("request_s", "token_s"), [(0.012, 1.7e-3), (0.2, 1e-5), (0.02, 1e-4)])
def test_both_figures_are_told_apart(request_s: float, token_s: float, seed: int) -> None:
    fit, rng = Fit(0.02, 1e-4), random.Random(seed)
    for _ in range(300):
        requests, tokens = rng.randint(1, 4), rng.lognormvariate(5, 1.5)
        learn(fit, requests, tokens, (request_s * requests + token_s * tokens) * rng.lognormvariate(0, 0.2))
    for requests, tokens in ((1, 20), (1, 2_000), (4, 400)):
        assert fit.of(requests, tokens) == pytest.approx(request_s * requests + token_s * tokens, rel=0.35), f"seed {seed}"


def test_what_always_comes_in_the_same_proportion_is_learnt_as_a_sum() -> None:
    fit = Fit(0.02, 1e-4)
    for _ in range(300):
        learn(fit, 1, 1_000, 0.36)
    assert fit.of(1, 1_000) == pytest.approx(0.36, rel=0.01)
    assert fit.request_s > 0.01


observations = st.lists(st.tuples(st.floats(1, 100), st.floats(1, 1e6), st.floats(-2, 2)), max_size=60)


@given(observations)
def test_figures_stay_positive_whatever_is_observed(observed: list[tuple[float, float, float]]) -> None:
    fit = Fit(0.02, 1e-4)
    for requests, tokens, error in observed:
        fit.learn(requests, tokens, error, MEMORY)
        assert 0 < fit.request_s < math.inf
        assert 0 < fit.token_s < math.inf
