"""A decision as people and programs read it: who could have had the request, what each held and scored, and how it went."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping

import msgspec

from kvatlas.route.cycle import Candidate
from kvatlas.route.decision import Decision, ProfileRun, Rating
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import Load
from kvatlas.route.log import Logged
from kvatlas.route.matches import PrefixMatch
from kvatlas.route.router import Router
from kvatlas.serve.routing.remedies import remedy
from kvatlas.types import Tier


class MatchShown(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an endpoint held of the prompt."""

    tokens: int
    matched_by: str
    """events: the engine said so. history: it was routed there before."""
    tiers: Mapping[Tier, int] = {}
    speculative_tokens: int = 0
    stale: str | None = None


class LoadShown(msgspec.Struct, frozen=True, omit_defaults=True):
    """How busy an endpoint was."""

    in_flight_requests: int
    in_flight_tokens: int
    in_flight_prefill_tokens: int
    waiting: int | None = None
    running: int | None = None
    kv_usage: float | None = None
    report_age_s: float | None = None
    """How old what the engine said is; not of decisions."""


class ScoreShown(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one scorer gave."""

    score: float
    weight: float
    parts: Mapping[str, float | str] = {}
    """What it went by, where it tells: the most important first, units last (``prefill_s``)."""


class CandidateShown(msgspec.Struct, frozen=True):
    """One endpoint that a profile could choose."""

    endpoint: str
    address: str
    match: MatchShown
    load: LoadShown
    scores: Mapping[str, ScoreShown]
    total: float
    picked: bool


class ProfileShown(msgspec.Struct, frozen=True):
    """One profile's choice; ``candidates`` best first, perhaps not all of them."""

    profile: str
    dropped: Mapping[str, tuple[str, ...]]
    """By filter."""
    candidates: tuple[CandidateShown, ...]
    candidates_count: int = 0
    """How many there were."""


class EndpointShown(msgspec.Struct, frozen=True):
    """One endpoint of the pool."""

    endpoint: str
    address: str
    pod: str
    dp_rank: int
    labels: Mapping[str, str]
    health: str
    """healthy, failing (requests fail), trial (one may try again), unreachable (polls find nobody)."""
    load: LoadShown


class EndpointsAnswer(msgspec.Struct, frozen=True):
    """Everyone a request could be sent to."""

    endpoints: tuple[EndpointShown, ...]


class OutcomeShown(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the request went; ``end`` None: it is on its way."""

    end: str | None = None
    sent_to_instead: tuple[str, ...] = ()
    ttft_s: float | None = None
    duration_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


class DecisionShown(msgspec.Struct, frozen=True):
    """One decision."""

    id: str
    at_s: float
    model: str
    prompt_tokens: int
    prompt_tokens_estimated: bool
    """Its tokens were not all known: the figure is from the text's length."""
    endpoint: str
    address: str
    why: str
    predicted_cached_tokens: int | None
    outcome: OutcomeShown
    took_us: float
    notes: tuple[str, ...]
    prefill: str | None
    encoders: tuple[str, ...]
    profiles: tuple[ProfileShown, ...]


class DecisionsAnswer(msgspec.Struct, frozen=True):
    """Decisions, newest first."""

    decisions: tuple[DecisionShown, ...]


def endpoints_shown(router: Router, health: Callable[[EndpointName], str], now_s: float) -> EndpointsAnswer:
    """Return the pool with how well and how busy everyone is. ``now_s``: on the router's clock."""

    def endpoint_shown(one: Endpoint) -> EndpointShown:
        load = router.load(one.name)
        age_s = None if load.report is None else round(now_s - load.report.at_s, 3)
        told = msgspec.structs.replace(_load(load), report_age_s=age_s)
        return EndpointShown(one.name, one.authority, one.pod, one.dp_rank, one.labels, health(one.name), told)

    return EndpointsAnswer(tuple(map(endpoint_shown, sorted(router.endpoints, key=lambda one: one.name))))


def shown(logged: Logged, candidates_max: int | None = None) -> DecisionShown:
    """Return a decision with what became of it. ``candidates_max``: so many of each profile, the best ones; None: all."""
    decision = logged.decision
    request = decision.request
    notes = decision.notes
    if request.tokens_problem is not None:
        told = (request.tokens_problem, remedy(request.tokens_problem))
        notes = (*notes, f"its tokens were not known: {'; '.join(filter(None, told))}")
    elif not request.tokens_complete:
        notes = (*notes, "only its first tokens were known")
    return DecisionShown(
        id=request.id,
        at_s=decision.at_s,
        model=request.model,
        prompt_tokens=request.prompt_tokens,
        prompt_tokens_estimated=logged.estimated,
        endpoint=decision.target.name,
        address=decision.target.authority,
        why=why(decision),
        predicted_cached_tokens=decision.predicted_cached_tokens,
        outcome=_outcome(logged),
        took_us=round(decision.took_s * 1e6, 1),
        notes=notes,
        prefill=_name(decision.prefill),
        encoders=tuple(encoder.name for encoder in decision.encoders),
        profiles=tuple(_profile(run, decision, candidates_max) for run in decision.runs.values() if run is not None),
    )


def why(decision: Decision) -> str:
    """Return the reason in one sentence."""
    target = decision.computes_prompt
    others = max((len(run.candidates) for run in decision.runs.values() if run is not None), default=1) - 1
    if others == 0:
        return f"{target.name} was the only candidate"
    found = decision.first_matches
    if found is None:
        return f"{target.name} scored best of {others + 1}; nothing is known of the prompt's prefix"
    held = found.of(target.name)
    best_name, best = max(found.by_endpoint.items(), key=lambda item: item[1].tokens, default=(target.name, held))
    if best.tokens == 0:
        return f"{target.name} scored best of {others + 1}; nobody holds any of the prompt"
    prompt = decision.request.prompt_tokens
    if held.tokens == best.tokens:
        return f"{target.name} holds {held.tokens} of {prompt} tokens, as much as anybody ({held.source.value})"
    return (
        f"{target.name} scored best with {held.tokens} of {prompt} tokens held; "
        f"{best_name} holds {best.tokens} and was passed over"
    )


def match_at(decision: Decision, endpoint: EndpointName) -> MatchShown:
    """Return what an endpoint held of the prompt, by the first producer."""
    found = decision.first_matches
    return _match(None if found is None else found.of(endpoint))


def _profile(run: ProfileRun, decision: Decision, candidates_max: int | None) -> ProfileShown:
    picked = {candidate.name for candidate in run.picked}
    found = decision.first_matches

    def rank(position: int) -> tuple[bool, float, str]:
        name = run.candidates[position].name
        return name not in picked, -round(run.totals[position], 6), name

    count = len(run.candidates)
    places: Iterable[int] = range(count)
    if candidates_max is not None:
        places = heapq.nlargest(candidates_max, places, key=run.totals.__getitem__)
        places = {*places, *(run.candidates.index(one) for one in run.picked if one in run.candidates)}
    best = sorted(places, key=rank)[:candidates_max]
    rows = []
    for position in best:
        candidate = run.candidates[position]
        scores = {rating.scorer: _score(rating, position) for rating in run.ratings}
        match = None if found is None else found.of(candidate.name)
        rows.append(_candidate(candidate, match, scores, run.totals[position], candidate.name in picked))
    dropped = {dropped.filter: dropped.endpoints for dropped in run.dropped}
    return ProfileShown(run.profile, dropped, tuple(rows), count)


def _score(rating: Rating, at: int) -> ScoreShown:
    parts = {} if rating.explained is None else {name: _rounded(part) for name, part in rating.explained.parts(at).items()}
    return ScoreShown(round(rating.scores[at], 6), rating.weight, parts)


def _rounded(part: float | str) -> float | str:
    """JSON has no infinity."""
    return float(f"{part:.6g}") if isinstance(part, float | int) and math.isfinite(part) else str(part)


def _candidate(
    candidate: Candidate, match: PrefixMatch | None, scores: Mapping[str, ScoreShown], total: float, picked: bool
) -> CandidateShown:
    return CandidateShown(
        endpoint=candidate.name,
        address=candidate.endpoint.authority,
        match=_match(match),
        load=_load(candidate.load),
        scores=scores,
        total=round(total, 6),
        picked=picked,
    )


def _match(match: PrefixMatch | None) -> MatchShown:
    if match is None:
        return MatchShown(0, "unknown")
    stale = None if match.stale is None else match.stale.value
    return MatchShown(
        match.tokens, match.source.value if match.tokens else "none", match.tiers, match.speculative_tokens, stale
    )


def _load(load: Load) -> LoadShown:
    report = load.report
    flying = load.in_flight
    return LoadShown(
        in_flight_requests=flying.requests,
        in_flight_tokens=flying.tokens,
        in_flight_prefill_tokens=flying.prefill_tokens,
        waiting=None if report is None else report.waiting,
        running=None if report is None else report.running,
        kv_usage=None if report is None else report.kv_usage,
    )


def _outcome(logged: Logged) -> OutcomeShown:
    outcome = logged.outcome
    if outcome is None:
        return OutcomeShown(sent_to_instead=logged.moves, ttft_s=logged.ttft_s)
    return OutcomeShown(
        end=outcome.end.value,
        sent_to_instead=logged.moves,
        ttft_s=logged.ttft_s,
        duration_s=outcome.duration_s,
        prompt_tokens=outcome.prompt_tokens,
        cached_tokens=outcome.cached_tokens,
        output_tokens=outcome.output_tokens,
    )


def _name(endpoint: Endpoint | None) -> str | None:
    return None if endpoint is None else endpoint.name
