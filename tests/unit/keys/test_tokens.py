"""Token input in every shape that callers have, and clear refusals of the rest."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from kvatlas.errors import TokensError
from kvatlas.keys import as_token_array

IDS = array("I", [0, 7, 4294967295])


@pytest.mark.parametrize(
    "tokens",
    [
        [0, 7, 4294967295],
        (0, 7, 4294967295),
        array("Q", [0, 7, 4294967295]),
        array("q", [0, 7, 4294967295]),
        np.array([0, 7, 4294967295]),
        np.array([0, 7, 4294967295], dtype=np.uint32),
        np.array([0, 9, 7, 9, 4294967295, 9], dtype=np.uint32)[::2],
        memoryview(IDS),
        memoryview(IDS).toreadonly(),
        [np.int64(0), np.int64(7), np.uint32(4294967295)],
    ],
    ids=lambda tokens: f"{type(tokens).__name__}-{getattr(tokens, 'format', getattr(tokens, 'dtype', ''))}",
)
def test_any_integers_become_one_array(tokens: object) -> None:
    assert as_token_array(tokens) == IDS


def test_an_array_of_unsigned_ints_is_taken_as_it_is() -> None:
    assert as_token_array(IDS) is IDS


@pytest.mark.parametrize(
    ("tokens", "position"),
    [([1, -1], 1), ([1, 2, 2**32], 2), (["a"], 0), ([1, None], 1), ([1, 2.5], 1), (np.array([1, -3]), 1), ([1, [2]], 1)],
)
def test_a_bad_value_is_refused_with_its_position(tokens: object, position: int) -> None:
    with pytest.raises(TokensError, match=f"at position {position}") as refused:
        as_token_array(tokens)
    assert refused.value.position == position


@pytest.mark.parametrize(
    "tokens", ["text", b"bytes", bytearray(b"x"), None, 5, np.array([1.5]), np.zeros((2, 2), int), {1: 2}, np.array(["a"])]
)
def test_what_is_no_list_of_ids_is_refused(tokens: object) -> None:
    with pytest.raises(TokensError, match="token_ids"):
        as_token_array(tokens)
