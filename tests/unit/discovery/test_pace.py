"""When an engine is polled next."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.discovery.pace import PollLimits, PollOutcome, wait_s

LIMITS = PollLimits(interval_s=0.05, backoff_max_s=5.0)


@pytest.mark.parametrize(("took_s", "wait"), [(0.0, 0.05), (0.01, 0.04), (0.025, 0.025), (0.2, 0.2)])
def test_polls_come_at_the_interval_and_take_at_most_half_of_the_time(took_s: float, wait: float) -> None:
    assert wait_s(LIMITS, took_s, 0, random.Random(1)) == pytest.approx(wait)


@given(st.integers(1, 10_000), st.integers())
def test_after_failures_the_wait_doubles_up_to_its_bound(failures: int, seed: int) -> None:
    longest = min(5.0, 0.05 * 2.0 ** min(failures, 20))
    assert longest / 2 <= wait_s(LIMITS, 0.001, failures, random.Random(seed)) <= longest


def test_somebody_is_there_unless_there_is_no_connection() -> None:
    assert {outcome.value: outcome.reached for outcome in PollOutcome} == {
        "reported": True,
        "unreachable": False,
        "late": None,
        "refused": True,
        "garbage": True,
    }
