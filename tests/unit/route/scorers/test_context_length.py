"""Engines labelled for prompt lengths: how ranges are rated, and who is left out."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.cycle import Candidate
from kvatlas.route.scorers.context_length import LABEL, ContextLengthAware, Range, fit
from tests.models.scoring import candidate, cycle, plugin


def labelled(name: str, label: str | None) -> Candidate:
    return candidate(name, labels={} if label is None else {LABEL: label})


def score(label: str | None, tokens: int) -> float:
    one = labelled("a", label)
    (found,) = plugin(ContextLengthAware).score(cycle([one], prompt_tokens=tokens), [one])
    return float(found)


@pytest.mark.parametrize(
    ("label", "tokens", "expected"),
    [
        ("0-2048", 1024, 0.3 + 0.7 * (0.7 / 1.2048 + 0.3 * 0.5)),
        (" 2048 - 8192 ", 2048, 0.3 + 0.7 * (0.7 / 1.6144 + 0.3)),
        ("0-10000", 10_000, 0.3 + 0.7 * 0.35),
        ("500-500", 500, 1.0),
        ("0-2048", 3048, 0.15),
        ("2048-8192", 1048, 0.15),
        (None, 100, 0.5),
    ],
)
def test_ranges_are_rated_by_width_room_and_distance(label: str | None, tokens: int, expected: float) -> None:
    assert score(label, tokens) == pytest.approx(expected)


@pytest.mark.parametrize("label", ["", "2048", "-5-10", "a-b", "10-5", "1-2-3", "1-9999999999999999999", "²-9"])
def test_a_label_that_is_no_range_has_no_score_and_is_told(label: str) -> None:
    odd, good = labelled("odd", label), labelled("good", "0-100")
    asked = cycle([odd, good], prompt_tokens=10)
    assert plugin(ContextLengthAware).score(asked, [odd, good])[0] == 0.0
    assert asked.notes == [f"plugin: 1 endpoints have a label {LABEL} that is no range min-max"]


def test_without_filtering_all_stay() -> None:
    short, long = labelled("short", "0-100"), labelled("long", "101-200")
    assert list(plugin(ContextLengthAware).filter(cycle([short, long], prompt_tokens=10), [short, long])) == [short, long]


def test_filtering_keeps_who_is_in_range_and_who_has_no_label() -> None:
    candidates = [labelled(str(at), label) for at, label in enumerate(["0-100", "101-200", None, "any", "100-100"])]
    kept = plugin(ContextLengthAware, {"enableFiltering": True}).filter(cycle(candidates, prompt_tokens=100), candidates)
    assert [one.name for one in kept] == ["0", "2", "4"]


def test_a_length_that_is_estimated_counts_and_one_that_is_not_known_is_0() -> None:
    short, long = labelled("short", "0-100"), labelled("long", "101-200")
    scorer = plugin(ContextLengthAware)
    estimated = scorer.score(cycle([short, long], token_ids=None, prompt_tokens_estimated=150), [short, long])
    assert estimated[1] > estimated[0]
    unknown = scorer.score(cycle([short, long], token_ids=None), [short, long])
    assert unknown[0] > unknown[1]


def test_another_label_may_be_asked_for() -> None:
    one = candidate("a", labels={"tokens": "5-5"})
    assert plugin(ContextLengthAware, {"label": "tokens"}).score(cycle([one], prompt_tokens=5), [one]) == [1.0]
    with pytest.raises(msgspec.ValidationError):
        plugin(ContextLengthAware, {"label": ""})


lengths = st.integers(1, 10**6)


@given(lengths, lengths, lengths, lengths, lengths)
def test_a_range_that_holds_the_prompt_beats_one_that_does_not(
    length: int, below: int, above: int, gap: int, width: int
) -> None:
    inside = fit(length, Range(length - below, length + above))
    assert 0.3 < inside <= 1.0
    assert 0.0 <= fit(length, Range(length + gap, length + gap + width)) < 0.3
    assert 0.0 <= fit(length, Range(length - gap - width, length - gap)) < 0.3


@given(lengths, lengths, lengths)
def test_farther_from_the_range_is_worse(length: int, gap: int, farther: int) -> None:
    assert fit(length + gap + farther, Range(0, length)) < fit(length + gap, Range(0, length))
