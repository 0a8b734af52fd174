"""``kvatlas explain``."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvatlas.cli.client import ServiceClient
from kvatlas.cli.columns import Column, Gives, fitted
from kvatlas.cli.decisions import decisions_of_all
from kvatlas.cli.options import DEFAULT_URL, AsJson, ServiceToken, ServiceUrl
from kvatlas.cli.score_parts import endpoint_of, part_tables
from kvatlas.cli.screen import screen, show_json, show_table
from kvatlas.config.quantities import round_duration
from kvatlas.serve.routing.explain import CandidateShown, DecisionsAnswer, DecisionShown, MatchShown, OutcomeShown, ProfileShown

GIVING_WAY = ("address", "prefilling", "kv", "running", "waiting", "in flight", "matched by", "endpoint")
"""What a narrow screen does without, the first one first."""


def explain(
    request_id: Annotated[
        str | None, typer.Argument(help="A request's id (x-request-id). Without it, the last decisions.", metavar="ID")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Only requests that went to this endpoint: its name or ip:port.", metavar="NAME")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="How many decisions to list.")] = 20,
    url: ServiceUrl = DEFAULT_URL,
    token: ServiceToken = None,
    json: AsJson = False,
) -> None:
    """Show why requests went where they went: the last ones as a list, or one in full.

    In full: who could have had it, what each held of the prompt, how busy each was, what each scorer gave and went by, and how
    it went. Where several workers share a port, all are asked.

    Examples:

        kvatlas explain
        kvatlas explain 6f1c0a52-4f0e-4b51-9d5e-1a0c8e0f5d11
        kvatlas explain --endpoint default/llama-0 --json | jq '.decisions[].why'
    """
    found = decisions_of_all(ServiceClient(url, token), request_id, endpoint, limit)
    decisions = found.decisions
    if json:
        show_json(DecisionsAnswer(decisions))
    elif request_id is not None:
        show_table(lambda width: _in_full(decisions[0], width))
    else:
        show_table(lambda width: _listed(decisions, width, endpoint))
    for problem in found.missing:
        screen(stderr=True).print(f"Not of all workers: {problem}", soft_wrap=True)


def _listed(decisions: tuple[DecisionShown, ...], width: int | None, endpoint: str | None = None) -> RenderableType:
    if not decisions:
        others = "" if endpoint is None else f"Nothing kept went to {endpoint}; without --endpoint all is listed. "
        return Text(f"No such decision is kept. {others}Send a request through the proxy or the gateway.")
    columns = [
        Column("request", [Text(one.id) for one in decisions], Gives.SHORTEN),
        Column("endpoint", [Text(_served_by(one)) for one in decisions], Gives.SHORTEN),
        Column("prompt", [Text(_prompt(one)) for one in decisions], right=True),
        Column("predicted", [_count(one.predicted_cached_tokens) for one in decisions], right=True),
        Column("cached", [_count(one.outcome.cached_tokens) for one in decisions], right=True),
        Column("TTFT", [_time(one.outcome.ttft_s) for one in decisions], right=True),
        Column("end", [Text(one.outcome.end or "on its way") for one in decisions], Gives.DROP),
        Column("why", [Text(one.why) for one in decisions], Gives.DROP),
    ]
    return fitted("Decisions, newest first", columns, width, ("why", "end", "request", "endpoint"))


def _served_by(decision: DecisionShown) -> str:
    return (decision.endpoint, *decision.outcome.sent_to_instead)[-1]


def _prompt(decision: DecisionShown) -> str:
    return f"{'~' if decision.prompt_tokens_estimated else ''}{decision.prompt_tokens}"


def _in_full(decision: DecisionShown, width: int | None) -> RenderableType:
    rows = [
        ("request", f"{decision.id}, {_clock(decision.at_s)}, model {decision.model}, {_prompt(decision)} prompt tokens"),
        ("sent to", f"{decision.endpoint} ({decision.address})"),
        ("why", decision.why),
    ]
    if decision.prefill is not None:
        rows.append(("prefill", decision.prefill))
    rows.append(("went", _went(decision.outcome, decision.predicted_cached_tokens)))
    rows.append(("took", f"{decision.took_us:.0f} us to decide"))
    rows.extend(("note", note) for note in decision.notes)
    head = Table.grid(padding=(0, 2, 0, 0))
    head.add_column(justify="right", style="bold", width=8)
    head.add_column(overflow="fold")
    for name, value in rows:
        head.add_row(name, value)
    tables = (table for profile in decision.profiles for table in (_profile(profile, width), *part_tables(profile, width)))
    return Group(head, *tables)


def _went(outcome: OutcomeShown, predicted: int | None) -> str:
    parts = [outcome.end or "on its way"]
    if outcome.sent_to_instead:
        parts.append(f"sent again to {', '.join(outcome.sent_to_instead)}")
    if outcome.ttft_s is not None:
        parts.append(f"first token after {_time(outcome.ttft_s).plain}")
    if outcome.cached_tokens is not None:
        parts.append(f"{outcome.cached_tokens} tokens cached, {'nothing' if predicted is None else predicted} predicted")
    elif predicted is not None:
        parts.append(f"{predicted} cached tokens predicted, the engine told none")
    if outcome.output_tokens is not None:
        parts.append(f"{outcome.output_tokens} tokens written")
    return ", ".join(parts)


def _profile(profile: ProfileShown, width: int | None) -> RenderableType:
    rows = profile.candidates
    scorers = list(rows[0].scores) if rows else []
    columns = [
        Column("endpoint", [endpoint_of(row) for row in rows], Gives.SHORTEN),
        Column("address", [Text(row.address) for row in rows], Gives.DROP),
        Column("held", [Text(str(row.match.tokens)) for row in rows], right=True),
        Column("matched by", [Text(_matched(row.match)) for row in rows], Gives.DROP),
        Column("in flight", [Text(str(row.load.in_flight_requests)) for row in rows], Gives.DROP, right=True),
        Column("prefilling", [Text(str(row.load.in_flight_prefill_tokens)) for row in rows], Gives.DROP, right=True),
        Column("waiting", [_count(row.load.waiting) for row in rows], Gives.DROP, right=True),
        Column("running", [_count(row.load.running) for row in rows], Gives.DROP, right=True),
        Column("kv", [_share(row.load.kv_usage) for row in rows], Gives.DROP, right=True),
        *(Column(_heading(rows, scorer), [_score(row, scorer) for row in rows], right=True) for scorer in scorers),
        Column("total", [Text(f"{row.total:.3f}") for row in rows], right=True),
    ]
    dropped = "".join(f"\n  left out by {name}: {', '.join(names)}" for name, names in profile.dropped.items())
    shown = fitted(f"Profile {profile.profile}", columns, width, GIVING_WAY)
    return Group(shown, Text(dropped.strip("\n"))) if dropped else shown


def _matched(match: MatchShown) -> str:
    parts = [match.matched_by, *(f"{tokens} {tier}" for tier, tokens in match.tiers.items() if tier != "gpu")]
    if match.speculative_tokens:
        parts.append(f"{match.speculative_tokens} expected")
    if match.stale:
        parts.append(f"stale: {match.stale}")
    return ", ".join(parts)


def _heading(rows: tuple[CandidateShown, ...], scorer: str) -> str:
    weight = rows[0].scores[scorer].weight
    name = scorer.removesuffix("-scorer")
    return name if weight == 1 else f"{name} x{weight:g}"


def _score(row: CandidateShown, scorer: str) -> Text:
    return Text(f"{row.scores[scorer].score:.3f}")


def _count(value: int | None) -> Text:
    return Text("" if value is None else str(value))


def _share(value: float | None) -> Text:
    return Text("" if value is None else f"{value:.0%}")


def _time(seconds: float | None) -> Text:
    return Text("" if seconds is None else round_duration(seconds))


def _clock(at_s: float) -> str:
    return datetime.fromtimestamp(at_s).astimezone().strftime("%H:%M:%S.%f")[:-3]
