"""Durations and sizes survive being written and read."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.config.quantities import format_duration, format_size, parse_duration, parse_size


@given(st.integers(0, 1 << 50))
def test_a_size_reads_back_as_it_was_written(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(0, 10**9))
def test_a_duration_in_milliseconds_reads_back_as_it_was_written(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000, rel=1e-5)


@given(st.one_of(st.text(max_size=20), st.binary(max_size=5), st.booleans(), st.none(), st.lists(st.integers())))
def test_whatever_comes_is_a_quantity_or_a_value_error(value: object) -> None:
    for parse in (parse_duration, parse_size):
        with contextlib.suppress(ValueError):
            assert parse(value) >= 0
