"""Answers are watched while they pass: the first token and the usage are seen however the bytes are cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.serve.routing.answers import TAIL_BYTES_MAX, AnswerReader, Usage

USAGE = {
    "prompt_tokens": 40,
    "completion_tokens": 7,
    "total_tokens": 47,
    "prompt_tokens_details": {"cached_tokens": 32},
}
EVENTS = (
    b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"a \\"usage\\": {"}}],"usage":null}\n\n'
    b'data: {"choices":[],"usage":' + json.dumps(USAGE).encode() + b"}\n\ndata: [DONE]\n\n"
)
WHOLE = json.dumps({"choices": [{"text": 'a "usage": {'}], "usage": USAGE}).encode()


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


@given(cuts=st.lists(st.integers(0, 1000), max_size=8), stream=st.booleans())
def test_usage_and_the_first_token_are_seen_however_bytes_are_cut(cuts: list[int], stream: bool) -> None:
    reader = AnswerReader(stream=stream)
    firsts = [reader.feed(piece) for piece in pieces(EVENTS if stream else WHOLE, cuts)]
    assert firsts.count(True) == 1
    assert reader.said_done is stream
    assert reader.usage() == Usage(prompt_tokens=40, cached_tokens=32, output_tokens=7)


def test_a_comment_or_an_empty_piece_is_no_token() -> None:
    reader = AnswerReader(stream=True)
    assert not reader.feed(b"")
    assert not reader.feed(b": keep-alive\n\n")
    assert reader.feed(b"data: {}\n\n")
    assert not reader.feed(b"data: {}\n\n")


def test_names_of_the_responses_api_are_known_too() -> None:
    reader = AnswerReader(stream=False)
    usage = {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 2}
    reader.feed(json.dumps({"output": [], "usage": usage}).encode())
    assert reader.usage() == Usage(9, 4, 2)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b'{"usage": {',
        b'{"usage": {"prompt_tokens": -4, "prompt_tokens_details": 5, "completion_tokens": true}}',
        b'{"usage": {"prompt_tokens": "many", "prompt_tokens_details": null}}',
        b'{"usage": {' + b'"a": {' * 5000,
        b"\xff" * 100 + b'"usage": {}',
    ],
)
def test_an_odd_answer_has_no_usage(body: bytes) -> None:
    reader = AnswerReader(stream=False)
    reader.feed(body)
    assert reader.usage() == Usage()


def test_a_stream_is_done_once_it_says_so() -> None:
    reader = AnswerReader(stream=True)
    reader.feed(EVENTS.partition(b"data: [DONE]")[0])
    assert not reader.said_done


def test_of_a_long_answer_the_end_is_kept() -> None:
    reader = AnswerReader(stream=False)
    for _ in range(100):
        reader.feed(b"x" * 10_000)
    reader.feed(WHOLE)
    assert reader.usage().cached_tokens == 32
    assert reader.kept_bytes <= 2 * TAIL_BYTES_MAX
