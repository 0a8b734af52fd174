"""The last half hour, in arrays of a fixed size; and what grew of late."""

from __future__ import annotations

import math

from kvatlas.serve.dashboard.history import History, Increase, quantile


def test_steps_are_told_from_the_one_asked_for() -> None:
    history = History()
    for number in range(5):
        history.add({"requests": number})
    shown = history.since(3)
    assert (shown.first, shown.columns["requests"]) == (3, [3.0, 4.0])


def test_what_is_not_known_of_a_step_is_none() -> None:
    history = History()
    history.add({"requests": 1, "ttft_p50_s": math.nan})
    shown = history.since(0)
    assert shown.columns["ttft_p50_s"] == shown.columns["ttft_p90_s"] == [None]


def test_old_steps_make_room() -> None:
    history = History(steps_max=4)
    for number in range(10):
        history.add({"requests": number})
    shown = history.since(0)
    assert (shown.first, shown.columns["requests"]) == (6, [6.0, 7.0, 8.0, 9.0])


def test_who_is_ahead_of_a_new_start_is_told_so() -> None:
    history = History()
    history.add({})
    shown = history.since(700)
    assert (shown.first, shown.columns["requests"]) == (1, [])


def test_quantiles_are_values_that_were_there() -> None:
    assert quantile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([3.0, 1.0, 2.0, 4.0], 0.9) == 4.0
    assert math.isnan(quantile([], 0.5))


def test_growth_is_told_within_the_window_alone() -> None:
    increase = Increase(window_s=10.0)
    assert increase.look(0.0, {"gaps": 5.0}) == {"gaps": 0.0}
    assert increase.look(6.0, {"gaps": 7.0}) == {"gaps": 2.0}
    assert increase.look(12.0, {"gaps": 8.0, "new": 3.0}) == {"gaps": 1.0, "new": 3.0}
    assert increase.seconds == 6.0
