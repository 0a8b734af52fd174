"""Prompts are cut and refused as vLLM 0.32 does it; ``tests/golden/test_tokens_corpus.py`` compares with a real one."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.prompts import Truncation
from kvatlas.tokens.truncation import trim_text, truncate

TOKENS = array("I", range(10))


def _cut(tokens: int, side: Any = None, **kwargs: Any) -> list[int]:
    return list(truncate(TOKENS, Truncation(tokens, side), kwargs.pop("max_model_len", 20), **kwargs))


def _reason(*args: Any, **kwargs: Any) -> tuple[TokenizationReason, str]:
    with pytest.raises(TokenizationError) as caught:
        truncate(*args, **kwargs)
    return caught.value.reason, caught.value.field


def test_without_truncation_all_tokens_stay() -> None:
    assert truncate(TOKENS, None, 20) is TOKENS
    assert truncate(TOKENS, None, None) is TOKENS


@pytest.mark.parametrize(("side", "kept"), [(None, [7, 8, 9]), ("left", [7, 8, 9]), ("right", [0, 1, 2])])
def test_the_left_is_cut_unless_the_right_is_asked_for(side: Any, kept: list[int]) -> None:
    assert _cut(3, side) == kept


def test_without_a_side_special_tokens_around_the_text_stay() -> None:
    assert _cut(4, None, before=1, after=1) == [0, 7, 8, 9]
    assert _cut(2, None, before=1, after=1) == [0, 9]


def test_with_a_side_special_tokens_are_cut_like_others() -> None:
    assert _cut(4, "left", before=1, after=1) == [6, 7, 8, 9]
    assert _cut(4, "right", before=1, after=1) == [0, 1, 2, 3]


def test_fewer_tokens_than_stand_around_the_text_are_cut_like_others() -> None:
    assert _cut(1, None, before=1, after=1) == [9]


def test_a_truncation_longer_than_the_prompt_changes_nothing() -> None:
    assert _cut(10) == list(TOKENS)
    assert _cut(15) == list(TOKENS)


def test_minus_one_is_what_the_model_takes_less_room_for_an_answer_that_is_asked_for() -> None:
    assert _cut(-1, max_model_len=6, max_output_tokens=3) == [5, 6, 7, 8, 9]
    assert _reason(TOKENS, Truncation(-1), 6) == (TokenizationReason.TOO_MANY_TOKENS, "prompt")
    assert _cut(-1, max_model_len=None) == list(TOKENS)


def test_a_prompt_must_leave_room_for_one_token() -> None:
    assert list(truncate(TOKENS, None, 11)) == list(TOKENS)
    assert _reason(TOKENS, None, 10) == (TokenizationReason.TOO_MANY_TOKENS, "prompt")
    assert _reason(TOKENS, None, 9) == (TokenizationReason.TOO_MANY_TOKENS, "prompt")


@pytest.mark.parametrize("tokens", [0, -2, 21, 2**63, True, 1.5])
def test_truncations_that_make_no_sense_are_refused(tokens: Any) -> None:
    assert _reason(TOKENS, Truncation(tokens), 20) == (TokenizationReason.BAD_TRUNCATION, "truncate_prompt_tokens")


def test_an_unknown_side_is_refused() -> None:
    side: Any = "middle"
    assert _reason(TOKENS, Truncation(3, side), 20) == (TokenizationReason.BAD_TRUNCATION, "truncation_side")


def test_more_output_than_the_model_takes_is_refused() -> None:
    assert _reason(TOKENS, None, 20, max_output_tokens=21) == (TokenizationReason.TOO_MANY_TOKENS, "max_tokens")


def test_no_tokens_are_refused() -> None:
    assert _reason(array("I"), None, 20) == (TokenizationReason.BAD_TEXT, "prompt")


def test_a_text_longer_than_its_tokens_could_be_is_refused_or_cut_where_a_side_is_named() -> None:
    text = "abcdefghij" * 3
    assert trim_text(text, None, 10, 3) == text
    with pytest.raises(TokenizationError) as caught:
        trim_text(text, None, 9, 3)
    assert caught.value.reason is TokenizationReason.TOO_MANY_TOKENS
    assert trim_text(text, Truncation(5), 9, 3) == text
    assert trim_text(text, Truncation(5, "left"), 9, 3) == text[3:]
    assert trim_text(text, Truncation(5, "right"), 9, 3) == text[:27]
    assert trim_text(text, None, None, 3) == text
