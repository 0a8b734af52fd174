"""A decision as it is shown: its reason in a sentence, what scores were made of, and how it went."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import msgspec
import pytest

from kvatlas.config import describe_config
from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.errors import TokenizationReason
from kvatlas.route.cycle import Candidate
from kvatlas.route.decision import Decision, Dropped, ProfileRun, Rating
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import EngineReport, InFlight, Load
from kvatlas.route.log import Logged
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.plugins import ExplainedScores
from kvatlas.route.request import RouteRequest
from kvatlas.serve.routing.explain import DecisionsAnswer, DecisionShown, match_at, shown, why
from kvatlas.serve.routing.remedies import REMEDIES, remedy
from kvatlas.types import CPU, GPU, StaleReason

A, B, C = pool_from_urls([f"http://10.0.0.{number}:8000" for number in (1, 2, 3)]).endpoints
BUSY = Load(
    EngineReport(at_s=1.0, waiting=2, running=5, kv_usage=0.5),
    InFlight(requests=3, tokens=900, prefill_requests=1, prefill_tokens=300),
)


class Parted(ExplainedScores):
    """Scores that were made of one thing each."""

    def parts(self, at: int) -> Mapping[str, float | str]:
        return {"ttft_s": 0.123456789 * (at + 1), "samples": at, "wait_s": math.inf, "explored": "no"}


def decision(
    held: Mapping[EndpointName, PrefixMatch] | None = None,
    *,
    candidates: Sequence[Endpoint] = (A, B, C),
    target: Endpoint = A,
    prefill: Endpoint | None = None,
    request: RouteRequest | None = None,
) -> Decision:
    """Return a decision among candidates; ``held`` None: no producer could tell."""
    rated = tuple(Candidate(one, BUSY if one is A else Load()) for one in candidates)
    scores = [1.0 / (1 + at) for at in range(len(rated))]
    run = ProfileRun(
        profile="default",
        candidates=rated,
        dropped=(Dropped("decode-filter", ("gone",)),),  # type: ignore[arg-type]
        ratings=(Rating("queue-scorer", 2.0, tuple(scores)), Rating("parted", 1.0, tuple(scores), Parted(scores))),
        totals=tuple(3 * score for score in scores),
        picked=tuple(one for one in rated if one.endpoint is target),
    )
    matches = {} if held is None else {"p": PrefixMatches(held, 16, 10)}
    return Decision(
        request=request or RouteRequest(id="r1", model="m", prompt_tokens_estimated=160),
        at_s=1_700_000_000.0,
        targets=(target,),
        prefill=prefill,
        runs={"default": run},
        matches=matches,
        notes=("a note",),
        took_s=0.0001234,
    )


def events(tokens: int) -> PrefixMatch:
    return PrefixMatch(tokens, MatchSource.EVENTS)


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (decision(candidates=[A]), f"{A.name} was the only candidate"),
        (decision(), f"{A.name} scored best of 3; nothing is known of the prompt's prefix"),
        (decision({}), f"{A.name} scored best of 3; nobody holds any of the prompt"),
        (decision({B.name: events(0)}), f"{A.name} scored best of 3; nobody holds any of the prompt"),
        (decision({A.name: events(96), B.name: events(96)}), f"{A.name} holds 96 of 160 tokens, as much as anybody (events)"),
        (
            decision({A.name: PrefixMatch(64, MatchSource.HISTORY)}),
            f"{A.name} holds 64 of 160 tokens, as much as anybody (history)",
        ),
        (
            decision({A.name: events(32), B.name: events(128)}),
            f"{A.name} scored best with 32 of 160 tokens held; {B.name} holds 128 and was passed over",
        ),
        (
            decision({B.name: events(128)}, prefill=B),
            f"{B.name} holds 128 of 160 tokens, as much as anybody (events)",
        ),
    ],
)
def test_the_reason_is_one_sentence_about_who_computes_the_prompt(made: Decision, sentence: str) -> None:
    assert why(made) == sentence


def test_what_a_scorer_went_by_is_shown_for_each_candidate() -> None:
    first, second, _ = shown(Logged(decision({A.name: events(96)}))).profiles[0].candidates
    assert first.scores["parted"].parts == {"ttft_s": 0.123457, "samples": 0, "wait_s": "inf", "explored": "no"}
    assert second.scores["parted"].parts["ttft_s"] == 0.246914
    assert (first.scores["queue-scorer"].weight, first.scores["queue-scorer"].parts) == (2.0, {})


def test_candidates_are_shown_with_the_picked_one_first_then_by_score() -> None:
    (profile,) = shown(Logged(decision(target=B))).profiles
    assert [row.endpoint for row in profile.candidates] == [B.name, A.name, C.name]
    assert [row.picked for row in profile.candidates] == [True, False, False]
    assert profile.dropped == {"decode-filter": ("gone",)}


def test_load_is_shown_as_the_engine_and_the_router_know_it() -> None:
    by_name = {row.endpoint: row.load for row in shown(Logged(decision())).profiles[0].candidates}
    busy, unknown = by_name[A.name], by_name[B.name]
    assert (busy.in_flight_requests, busy.in_flight_tokens, busy.in_flight_prefill_tokens) == (3, 900, 300)
    assert (busy.waiting, busy.running, busy.kv_usage) == (2, 5, 0.5)
    assert (unknown.waiting, unknown.running, unknown.kv_usage) == (None, None, None)


def test_a_match_is_shown_with_its_tiers_and_its_doubts() -> None:
    match = PrefixMatch(96, MatchSource.EVENTS, tiers={GPU: 64, CPU: 32}, speculative_tokens=16, stale=StaleReason.GAP)
    told = match_at(decision({A.name: match}), A.name)
    assert (told.tokens, told.matched_by, told.tiers, told.speculative_tokens) == (96, "events", {GPU: 64, CPU: 32}, 16)
    assert told.stale == StaleReason.GAP.value
    assert match_at(decision({A.name: match}), B.name).matched_by == "none"
    assert match_at(decision(), A.name).matched_by == "unknown"


def test_how_a_request_went_is_shown_as_far_as_it_is_known() -> None:
    logged = Logged(decision())
    assert shown(logged).outcome.end is None
    logged.moved(B.name)
    logged.first_token(0.25)
    flying = shown(logged).outcome
    assert (flying.end, flying.ttft_s, flying.sent_to_instead) == (None, 0.25, (B.name,))
    logged.finished(Outcome(end=End.DONE, ttft_s=0.3, duration_s=1.0, prompt_tokens=160, cached_tokens=96, output_tokens=7))
    done = shown(logged).outcome
    assert (done.end, done.ttft_s, done.cached_tokens, done.output_tokens) == ("done", 0.3, 96, 7)


@pytest.mark.parametrize(
    ("request_", "note"),
    [
        (
            RouteRequest(id="r", model="m", tokens_problem="timeout"),
            "its tokens were not known: timeout; raise route.tokensTimeout or tokens.workers",
        ),
        (
            RouteRequest(id="r", model="m", tokens_problem="a reason of one's own"),
            "its tokens were not known: a reason of one's own",
        ),
        (RouteRequest(id="r", model="m", tokens_complete=False), "only its first tokens were known"),
    ],
)
def test_what_was_not_known_of_the_tokens_is_a_note(request_: RouteRequest, note: str) -> None:
    assert shown(Logged(decision(request=request_))).notes == ("a note", note)


def test_every_reason_why_tokens_are_not_known_has_a_remedy_that_names_settings_that_there_are() -> None:
    settings = {setting.path for setting in describe_config()}
    assert all(reason in REMEDIES for reason in TokenizationReason)
    for text in REMEDIES.values():
        assert set(re.findall(r"\b(?:tokens|route)\.\w+(?:\.\w+)?", text)) <= settings
    assert "tokens.maxModelLen" in (remedy("too_many_tokens") or "")


def test_decisions_survive_json() -> None:
    answer = DecisionsAnswer((shown(Logged(decision({A.name: events(96)}))),))
    assert msgspec.json.decode(msgspec.json.encode(answer), type=DecisionsAnswer) == answer


def test_older_services_that_tell_no_parts_are_read() -> None:
    plain = msgspec.to_builtins(shown(Logged(decision())))
    for row in plain["profiles"][0]["candidates"]:
        row["scores"]["parted"].pop("parts")
    read = msgspec.convert(plain, DecisionShown)
    assert read.profiles[0].candidates[0].scores["parted"].parts == {}


def test_of_many_candidates_the_picked_and_the_best_are_shown_and_all_are_counted() -> None:
    (profile,) = shown(Logged(decision(target=C)), 2).profiles
    assert [one.endpoint for one in profile.candidates] == [C.name, A.name]
    assert profile.candidates_count == 3
