"""What requests add up to."""

from __future__ import annotations

import random
from typing import Any

from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.route.cycle import Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.request import RouteRequest
from kvatlas.serve.dashboard.prefixes import HotPrefixes
from kvatlas.serve.dashboard.tally import Tally, Totals
from kvatlas.types import BlockKey

A, B = pool_from_urls(["http://10.0.0.1:8000", "http://10.0.0.2:8000"]).endpoints
KEYS = [BlockKey(number) for number in range(1, 5)]


def decision(predicted: int | None, **request: Any) -> tuple[Cycle, Decision]:
    """Return a decision for A, for a prompt of 100 tokens."""
    asked = RouteRequest(id="r", model="m", prompt_tokens_estimated=100, **request)
    found = {} if predicted is None else {A.name: PrefixMatch(predicted, MatchSource.EVENTS)}
    matches = {} if predicted is None else {"p": PrefixMatches(found, 16, 6)}
    made = Decision(request=asked, at_s=1.0, targets=(A,), runs={}, matches=matches)
    return Cycle(asked, (), 0.0, random.Random(1)), made


def test_without_a_router_queries_are_counted_with_what_the_best_holder_has() -> None:
    tally = Tally(16, HotPrefixes(), routed=False)
    tally.matched("m", KEYS, 70, 3)
    tally.matched("m", KEYS, 64, 4)
    assert tally.totals() == Totals(requests=2, prompt_tokens=134, saved_tokens=48 + 63)  # the last token is always computed


def test_whether_any_prompt_was_looked_up_in_the_index_is_known() -> None:
    tally = Tally(16, HotPrefixes(), routed=True)
    cycle, made = decision(48)
    tally.decided(cycle, made)
    assert not tally.prompts_matched
    tally.matched("m", KEYS, 70, 3)
    assert tally.prompts_matched


def test_a_router_is_believed_before_queries_and_engines_before_predictions() -> None:
    tally = Tally(16, HotPrefixes(), routed=True)
    tally.matched("m", KEYS, 70, 3)
    cycle, made = decision(48)
    tally.decided(cycle, made)
    tally.finished(made, A.name, Outcome(end=End.DONE, ttft_s=0.5, prompt_tokens=100, cached_tokens=80))
    tally.decided(cycle, made)
    tally.finished(made, A.name, Outcome(end=End.DONE))
    totals = tally.totals()
    assert (totals.requests, totals.prompt_tokens, totals.saved_tokens) == (2, 200, 80 + 48)
    assert (totals.told, totals.predicted_tokens, totals.actual_tokens, totals.under_tokens) == (1, 48, 80, 32)
    assert tally.take_ttfts_s() == [0.5]
    assert tally.take_ttfts_s() == []


def test_a_retry_elsewhere_says_nothing_of_the_prediction() -> None:
    tally = Tally(16, HotPrefixes(), routed=True)
    _, made = decision(48)
    tally.finished(made, B.name, Outcome(end=End.DONE, cached_tokens=0))
    assert tally.totals().told == 0


def test_requests_are_counted_by_endpoint_and_by_why_their_tokens_are_not_known() -> None:
    tally = Tally(16, HotPrefixes(), routed=True)
    for problem in (None, "timeout", "timeout"):
        tally.decided(*decision(None, tokens_problem=problem))
    assert tally.sent() == {A.name: 3}
    assert tally.without_tokens() == {"timeout": 2}
    tally.forget([A.name, B.name])
    assert tally.sent() == {}
