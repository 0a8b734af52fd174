"""What `kvatlas explain` shows, on narrow and wide screens."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console, RenderableType

from kvatlas.cli import explain
from kvatlas.config.quantities import round_duration
from kvatlas.serve.routing.explain import (
    CandidateShown,
    DecisionShown,
    LoadShown,
    MatchShown,
    OutcomeShown,
    ProfileShown,
    ScoreShown,
)

NAMES = ("default/vllm-llama-3-70b-instruct-7f9c6d5b8-x0k9k", "default/vllm-llama-3-70b-instruct-7f9c6d5b8-abcde")
PARTS = {
    "ttft_s": 1.234,
    "queue_s": 0.00043,
    "prefill_s": 0.0123,
    "tier_load_s": 0.0,
    "tokens_ahead": 900.0,
    "uncached_tokens": 13.0,
    "tokens_per_s": 20953.4,
    "slowness": 1.2345,
    "explored": "no",
}


def candidate(name: str, *, picked: bool, parts: dict[str, Any] | None = None, **match: Any) -> CandidateShown:
    return CandidateShown(
        endpoint=name,
        address="10.0.0.7:8000",
        match=MatchShown(**{"tokens": 1568, "matched_by": "events", **match}),
        load=LoadShown(1, 1581, 13, waiting=2, running=5, kv_usage=0.05),
        scores={"expected-ttft-scorer": ScoreShown(1.0, 2.0, PARTS if parts is None else parts)},
        total=2.0,
        picked=picked,
    )


def decided(*candidates: CandidateShown, **fields: Any) -> DecisionShown:
    made = DecisionShown(
        id="6f1c0a52-4f0e-4b51-9d5e-1a0c8e0f5d11",
        at_s=1_700_000_000.0,
        model="llama",
        prompt_tokens=1581,
        prompt_tokens_estimated=False,
        endpoint=NAMES[0],
        address="10.0.0.7:8000",
        why=f"{NAMES[0]} holds 1568 of 1581 tokens, as much as anybody (events)",
        predicted_cached_tokens=1568,
        outcome=OutcomeShown(end="done", ttft_s=0.058, cached_tokens=1552, output_tokens=4),
        took_us=224.0,
        notes=(),
        prefill=None,
        encoders=(),
        profiles=(ProfileShown("default", {}, candidates),),
    )
    return msgspec.structs.replace(made, **fields)


TWO = decided(candidate(NAMES[0], picked=True), candidate(NAMES[1], picked=False, tokens=0, matched_by="none"))


def printed(shown: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), markup=False, highlight=False)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def in_full(decision: DecisionShown, width: int = 200) -> str:
    return printed(explain._in_full(decision, width), width)


def test_a_decision_in_full_says_where_why_and_how_it_went() -> None:
    text = in_full(TWO)
    assert f"sent to  {NAMES[0]} (10.0.0.7:8000)" in text
    assert f"why  {TWO.why}" in text
    assert "done, first token after 58 ms, 1552 tokens cached, 1568 predicted, 4 tokens written" in text
    assert "224 us to decide" in text
    assert f"> {NAMES[0]}" in text
    assert "expected-ttft x2" in text


def test_what_scores_were_made_of_is_a_table_of_its_own() -> None:
    table = in_full(TWO).partition("What expected-ttft-scorer went by")[2]
    headings, values = table.split("\n")[2], table.split("\n")[4]
    assert headings.split()[:4] == ["endpoint", "ttft", "queue", "prefill"]
    for text in ("1.23 s", "430 us", "12 ms", "900", "13", "20953"):
        assert text in values
    assert "tokens/s" in headings


def test_parts_that_are_nothing_everywhere_are_left_out() -> None:
    assert "tier load" not in in_full(TWO)
    assert "explored" not in in_full(TWO)
    one = decided(candidate(NAMES[0], picked=True), candidate(NAMES[1], picked=False, parts={**PARTS, "explored": "yes"}))
    assert "explored" in in_full(one)


@pytest.mark.parametrize("parts", [{}, {"ttft_s": 0.0}])
def test_scorers_that_tell_nothing_have_no_table(parts: dict[str, Any]) -> None:
    assert "went by" not in in_full(decided(candidate(NAMES[0], picked=True, parts=parts)))


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_fit_the_screen_and_keep_what_matters_most(width: int) -> None:
    profile, _, parts = in_full(TWO, width).partition("What expected-ttft-scorer went by")
    assert "held" in profile
    assert "total" in profile
    assert "ttft" in parts
    assert ("slowness" in parts) == (width == 200)


def test_what_stands_before_the_tables_is_indented_where_it_wraps() -> None:
    head = in_full(TWO, 60).partition("Profile")[0].splitlines()
    assert len(head) > 5
    assert all(line.startswith(" ") for line in head)


def test_who_was_left_out_and_doubts_are_shown() -> None:
    odd = decided(
        candidate(NAMES[0], picked=True, stale="gap", speculative_tokens=16, tiers={"gpu": 1536, "cpu": 32}),
        prefill="default/p",
        notes=("no event has come from b",),
        profiles=(
            ProfileShown(
                "default",
                {"decode-filter": ("default/p",)},
                (candidate(NAMES[0], picked=True, stale="gap", speculative_tokens=16, tiers={"gpu": 1536, "cpu": 32}),),
            ),
        ),
    )
    text = in_full(odd)
    assert "left out by decode-filter: default/p" in text
    assert "events, 32 cpu, 16 expected, stale: gap" in text
    assert "note  no event has come from b" in text
    assert "prefill  default/p" in text


@pytest.mark.parametrize(
    ("outcome", "predicted", "text"),
    [
        (OutcomeShown(), None, "on its way"),
        (
            OutcomeShown(ttft_s=0.5),
            16,
            "on its way, first token after 500 ms, 16 cached tokens predicted, the engine told none",
        ),
        (OutcomeShown(end="done", cached_tokens=3), None, "done, 3 tokens cached, nothing predicted"),
        (OutcomeShown(end="unreachable", sent_to_instead=("b", "c")), None, "unreachable, sent again to b, c"),
    ],
)
def test_how_a_request_went_is_told_as_far_as_it_is_known(outcome: OutcomeShown, predicted: int | None, text: str) -> None:
    shown = in_full(msgspec.structs.replace(TWO, outcome=outcome, predicted_cached_tokens=predicted))
    assert f"went  {text}\n" in "\n".join(line.rstrip() for line in shown.splitlines()) + "\n"


def test_the_list_shows_one_line_a_decision_and_says_where_there_is_none() -> None:
    text = printed(explain._listed((TWO, TWO), 200), 200)
    assert text.count(TWO.id) == 2
    assert "1568" in text
    assert "1552" in text
    again = decided(
        *TWO.profiles[0].candidates, prompt_tokens_estimated=True, outcome=OutcomeShown(sent_to_instead=("default/b-1",))
    )
    text = printed(explain._listed((again,), 200), 200)
    assert "~1581" in text
    assert "default/b-1" in text
    assert "No such decision is kept" in printed(explain._listed((), 80), 80)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0"), (0.00043, "430 us"), (0.0043, "4.3 ms"), (0.12, "120 ms"), (1.234, "1.23 s")]
)
def test_durations_have_three_digits_at_most(seconds: float, text: str) -> None:
    assert round_duration(seconds) == text
