"""Quantiles in little memory."""

from __future__ import annotations

import math
import random

import pytest

from kvatlas.sim.results import Spread
from kvatlas.sim.spreads import SpreadCounter


@pytest.mark.parametrize("draw", ["uniform", "expovariate", "lognormvariate"])
def test_quantiles_lie_within_one_percent(draw: str) -> None:
    rng = random.Random(3)
    arguments = {"uniform": (0.001, 900.0), "expovariate": (7.0,), "lognormvariate": (0.0, 3.0)}[draw]
    values = [getattr(rng, draw)(*arguments) for _ in range(20_000)]
    counter = SpreadCounter()
    for value in values:
        counter.add(value)
    values.sort()
    spread = counter.spread()
    for share, found in ((0.5, spread.p50), (0.9, spread.p90), (0.99, spread.p99)):
        assert found == pytest.approx(values[math.ceil(share * len(values)) - 1], rel=0.01)
    assert spread.max == values[-1]
    assert spread.mean == pytest.approx(sum(values) / len(values))
    assert spread.count == len(values)


def test_values_of_nothing_are_zero() -> None:
    counter = SpreadCounter()
    for value in (0.0, 0.0, 0.0, 5.0):
        counter.add(value)
    assert (counter.spread().p50, counter.spread().max) == (0.0, 5.0)


def test_values_beyond_all_bounds_are_counted() -> None:
    counter = SpreadCounter()
    counter.add(1e12)
    assert counter.spread().p50 <= 1e12


def test_of_no_values_everything_is_zero() -> None:
    assert SpreadCounter().spread() == Spread()
