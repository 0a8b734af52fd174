"""Streams and endpoints side by side: one row for each engine, or rank of one. No IO, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec

from kvatlas.results import PodStatus
from kvatlas.route.cycle import Candidate
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.prefix.streams import StreamNames
from kvatlas.serve.dashboard.state import SILENT, EngineRow, FleetTotals
from kvatlas.types import Stream


class RouterView(msgspec.Struct, frozen=True):
    """What is read of the router."""

    candidates: Sequence[Candidate]
    health: Callable[[EndpointName], str]
    sent: Mapping[str, int]
    names: StreamNames
    """Which streams may be an endpoint's."""
    now_s: float
    """On the router's clock."""


def rows_of(pods: Sequence[PodStatus], lags_s: Mapping[str, float], router: RouterView | None) -> tuple[EngineRow, ...]:
    """Return a row for each endpoint with its stream, and for each stream that is no endpoint's; the most interesting first."""
    streams = {Stream(pod.pod, pod.dp_rank): pod for pod in pods}
    rows = []
    if router is not None:
        for candidate in router.candidates:
            known = next((stream for stream in router.names.of(candidate.endpoint) if stream in streams), None)
            pod = None if known is None else streams.pop(known)
            rows.append(_endpoint_row(candidate, pod, lags_s, router))
    rows += [_stream_row(str(stream), pod, lags_s) for stream, pod in streams.items()]
    rows.sort(key=_interest)
    return tuple(rows)


def totals_of(rows: Sequence[EngineRow]) -> FleetTotals:
    """Return all rows in sum."""
    return FleetTotals(
        engines=len(rows),
        by_state=Counter(row.state for row in rows),
        by_health=Counter(row.health for row in rows if row.health is not None),
        in_flight=sum(row.in_flight or 0 for row in rows),
        waiting=sum(row.waiting or 0 for row in rows),
        running=sum(row.running or 0 for row in rows),
        lag_s_max=max((row.lag_s for row in rows if row.lag_s is not None), default=None),
    )


def _interest(row: EngineRow) -> tuple[bool, int, int, str]:
    """Sort by trouble, then by who is busy, then by who holds most."""
    return not row.troubled, -(row.in_flight or 0) - (row.waiting or 0), -row.blocks, row.name


def _stream_row(name: str, pod: PodStatus, lags_s: Mapping[str, float]) -> EngineRow:
    return EngineRow(
        name=name,
        state=pod.state,
        stale_reason=pod.stale_reason,
        model=pod.model,
        source=pod.source,
        blocks=pod.blocks,
        orphans=pod.orphans,
        tiers=pod.tiers,
        block_sizes_tokens=pod.block_sizes_tokens,
        queue_depth=pod.queue_depth,
        gaps=pod.gaps,
        restarts=pod.restarts,
        replay_answers=pod.replay_answers,
        replay_problem=pod.replay_problem,
        event_age_s=_rounded(pod.last_event_age_s),
        lag_s=_rounded(lags_s.get(pod.pod)),
    )


def _endpoint_row(candidate: Candidate, pod: PodStatus | None, lags_s: Mapping[str, float], router: RouterView) -> EngineRow:
    name, load = candidate.name, candidate.load
    report, flying = load.report, load.in_flight
    row = EngineRow(name=name, state=SILENT) if pod is None else _stream_row(name, pod, lags_s)
    return msgspec.structs.replace(
        row,
        address=candidate.endpoint.authority,
        health=router.health(name),
        sent=router.sent.get(name, 0),
        in_flight=flying.requests,
        prefill_tokens=flying.prefill_tokens,
        waiting=None if report is None else report.waiting,
        running=None if report is None else report.running,
        kv_usage=None if report is None else round(report.kv_usage, 3),
        gpu_blocks=None if report is None else report.gpu_blocks,
        report_age_s=None if report is None else _rounded(router.now_s - report.at_s),
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
