"""Which places of a text are seams, and what a tokenizer must not have for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvatlas.tokens.seams import GPT2, Seams

TINYMODEL = Path(__file__).parents[2] / "data" / "tinymodel" / "tokenizer.json"
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tinymodel() -> dict[str, Any]:
    data: dict[str, Any] = msgspec.json.decode(TINYMODEL.read_bytes())
    return data


def added(content: str, **flags: bool) -> dict[str, Any]:
    token = {"id": 90_000, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {**token, "special": True, **flags}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def with_(data: dict[str, Any], **parts: Any) -> Seams:
    model = {**data["model"], **parts.pop("model", {})}
    tokens = [*data["added_tokens"], *parts.pop("added", [])]
    return Seams.of({**data, **parts, "model": model, "added_tokens": tokens})


def places(seams: Seams, text: str, end: int | None = None) -> list[int]:
    return [seam.at for seam in seams.before(text, len(text) if end is None else end)]


def test_words_newlines_and_special_tokens_part_a_text() -> None:
    seams = Seams.of(tinymodel())
    text = "one two\nthree<|im_end|> four.  five 6 seven"
    assert places(seams, text) == [23, 8, 3]
    assert [seam.special for seam in seams.before(text, len(text))] == [4, None, None]
    assert seams.reasons == ()


def test_a_seam_is_seen_only_with_what_follows_it() -> None:
    seams = Seams.of(tinymodel())
    assert [places(seams, "one two", end) for end in range(3, 8)] == [[], [], [], [3], [3]]
    assert places(seams, "a<|im_end|>", 10) == []
    assert places(seams, "a<|im_end|>") == [11]
    assert places(seams, "one e\u0301") == []  # a mark may change the letter before it


def test_long_texts_are_searched_in_windows_without_a_loss() -> None:
    seams = Seams.of(tinymodel())
    text = "word<|im_end|> x y\nz" * 400
    at_once = sorted((match.end() for match in seams._pattern.finditer(text)), reverse=True)  # type: ignore[union-attr]
    assert places(seams, text) == at_once
    assert places(Seams.of(tinymodel()), "a" * 5_000) == []


@pytest.mark.parametrize(
    "token",
    [
        added("<|im_end|>more"),  # what follows decides
        added("x<|im_end|>y"),
    ],
)
def test_no_seam_behind_a_mark_that_another_one_holds(token: dict[str, Any]) -> None:
    seams = with_(tinymodel(), added=[token])
    assert "<|im_end|>" not in seams.specials
    assert "<|im_start|>" in seams.specials
    assert "<|im_end|>" in seams.reasons[0]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_no_seam_behind_marks_that_look_around(flag: str) -> None:
    assert "<x>" not in with_(tinymodel(), added=[added("<x>", **{flag: True})]).specials


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": split(CL100K)},
        {"pre_tokenizer": split(CL100K, "Removed", True)},
        {"pre_tokenizer": split(GPT2), "normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, split(CL100K)]}},
        {"model": {"ignore_merges": True}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Strip"}, {"type": "Lowercase"}]}},
        {"added": [added("<mask>", lstrip=True)]},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
    ],
)
def test_words_are_seams_where_that_is_proven(parts: dict[str, Any]) -> None:
    seams = with_(tinymodel(), **parts)
    assert seams.text, seams.reasons


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Unknown"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a b"}, "content": "ab"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},  # can't be tried without a tokenizer
        {"pre_tokenizer": {"type": "UnicodeScripts"}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 5}},
        {"pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": "x"}},
        {"pre_tokenizer": split(r"\w+ \w+")},
        {"pre_tokenizer": split(r"(\p{L}+\s?)+")},
        {"pre_tokenizer": split(r"(?<=a) ")},
        {"pre_tokenizer": split(r"\p{L}+(?= x)|\s+")},
        {"pre_tokenizer": split(r"[a-z]+|\s+")},
        {"pre_tokenizer": split(r"\p{L}*")},
        {"pre_tokenizer": split(r"\p{L}+", "MergedWithNext")},
        {"pre_tokenizer": split(r"\s+", "Removed")},
        {"pre_tokenizer": None, "model": {"type": "Unigram", "vocab": [["a", -1.0]]}},
        {"pre_tokenizer": None, "model": {"type": "WordPiece"}},
        {"pre_tokenizer": None},  # characters that are not in the vocabulary vanish
        {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}, "model": {"ignore_merges": True}},
        {"added": [added("two words")]},
        {"added": [added("ends ")]},
        {"added": [added("word", lstrip=True)]},
        {"added": [added("word", single_word=True)]},
    ],
)
def test_no_seams_in_text_where_something_may_lie_across_or_is_unknown(parts: dict[str, Any]) -> None:
    seams = with_(tinymodel(), **parts)
    assert not seams.text
    assert any("none in text" in reason for reason in seams.reasons)
    assert "<|im_end|>" in seams.specials


def test_no_seams_in_text_where_an_entry_of_the_vocabulary_goes_across() -> None:
    data = tinymodel()
    data["pre_tokenizer"]["use_regex"] = False
    assert Seams.of(data).text
    data["model"]["vocab"]["wordĠw"] = 80_000
    assert not Seams.of(data).text


def test_newlines_are_no_seams_before_an_added_token_of_letters() -> None:
    seams = with_(tinymodel(), added=[added("Answer")])
    assert seams.text
    assert not seams.newlines
    assert places(seams, "one two\nthree") == [3]


@pytest.mark.parametrize("part", ["truncation", "padding"])
def test_no_seams_at_all_where_tokens_depend_on_the_whole_text(part: str) -> None:
    seams = with_(tinymodel(), **{part: {"max_length": 5}})
    assert not seams
    assert part in seams.reasons[0]


def test_no_seams_with_dropout() -> None:
    assert not with_(tinymodel(), model={"dropout": 0.1})
