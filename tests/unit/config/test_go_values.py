"""Durations and quantities are read as Go and Kubernetes read them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.config.go_values import parse_go_duration, parse_quantity


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("0s", 0),
        ("60s", 60),
        ("1m30s", 90),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("300ms", 0.3),
        ("2µs", 2e-6),
        ("1h2m3s", 3723),
    ],
)
def test_durations_have_a_unit_for_each_number(text: str, seconds: float) -> None:
    assert parse_go_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "60", "1d", "-1s", "1 s", "s", "1.s.", "1e3s", "٣s"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="1m30s"):
        parse_go_duration(text)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0, 0),
        (5000, 5000),
        ("5k", 5000),
        ("500M", 500_000_000),
        ("1Gi", 1 << 30),
        ("1.5Ki", 1536),
        ("1e3", 1000),
        ("100m", 1),
        ("+2", 2),
    ],
)
def test_quantities_are_whole_numbers_rounded_up(value: int | str, number: int) -> None:
    assert parse_quantity(value) == number


@pytest.mark.parametrize("value", ["", "-1", -1, "1GB", "1 Gi", "k", True, float("nan"), float("inf"), "1ki"])
def test_what_is_no_quantity_is_refused_with_an_example(value: int | float | str) -> None:
    with pytest.raises(ValueError, match="1Gi"):
        parse_quantity(value)


@given(st.text(alphabet="0123456789.hmsunµeEkMGi+-", max_size=12))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    for parse in (parse_go_duration, parse_quantity):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0
