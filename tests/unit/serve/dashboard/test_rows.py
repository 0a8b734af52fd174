"""Streams and endpoints side by side."""

from __future__ import annotations

from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.results import PodStatus
from kvatlas.route.cycle import Candidate
from kvatlas.route.load import EngineReport, InFlight, Load
from kvatlas.route.prefix.streams import StreamNames
from kvatlas.serve.dashboard.rows import RouterView, rows_of, totals_of
from kvatlas.types import DpRank, PodId, StaleReason

A, B = pool_from_urls(["http://10.0.0.1:8000", "http://10.0.0.2:8000"]).endpoints


def pod(name: str, blocks: int = 0, stale: StaleReason | None = None) -> PodStatus:
    state = "fresh" if stale is None else "stale"
    return PodStatus(
        pod=PodId(name), dp_rank=DpRank(0), model="m", state=state, stale_reason=stale, blocks=blocks, orphans=0,
        block_sizes_tokens=(16,), groups={}, next_seq=1, queue_depth=0, gaps=0, replays=0, replay_answers=None, restarts=0,
        last_event_age_s=1.23456, source="tcp://x:1",
    )  # fmt: skip


def router(*candidates: Candidate) -> RouterView:
    names = StreamNames()
    names.pool_changed([one.endpoint for one in candidates])
    return RouterView(candidates, lambda _name: "healthy", {A.name: 7}, names, now_s=100.0)


def test_without_a_router_streams_are_rows() -> None:
    (row,) = rows_of([pod("p", 5)], {"p": 0.25}, None)
    assert (row.name, row.state, row.blocks, row.lag_s, row.event_age_s, row.health) == ("p", "fresh", 5, 0.25, 1.235, None)


def test_an_endpoint_and_its_stream_are_one_row() -> None:
    load = Load(EngineReport(at_s=98.5, waiting=2, running=3, kv_usage=0.5, gpu_blocks=100), InFlight(requests=4, tokens=9))
    (row,) = rows_of([pod("10.0.0.1:8000", 5)], {}, router(Candidate(A, load)))
    assert (row.name, row.blocks, row.gpu_blocks, row.in_flight, row.waiting, row.running) == (A.name, 5, 100, 4, 2, 3)
    assert (row.report_age_s, row.sent, row.health, row.address) == (1.5, 7, "healthy", "10.0.0.1:8000")


def test_an_endpoint_without_events_is_silent_and_a_stream_of_nobody_is_a_row_too() -> None:
    rows = rows_of([pod("other")], {}, router(Candidate(A, Load())))
    assert {row.name: row.state for row in rows} == {A.name: "silent", "other": "fresh"}


def test_trouble_comes_first_then_who_is_busy_then_who_holds_most() -> None:
    busy = Load(in_flight=InFlight(requests=3))
    pods = [pod("10.0.0.2:8000"), pod("little", 1), pod("much", 9), pod("wrong", stale=StaleReason.GAP)]
    rows = rows_of(pods, {}, router(Candidate(A, Load()), Candidate(B, busy)))
    assert [row.name for row in rows] == ["wrong", B.name, "much", "little", A.name]


def test_totals_count_states_and_sum_load() -> None:
    rows = rows_of([pod("a"), pod("b", stale=StaleReason.GAP)], {"a": 0.5, "b": 2.0}, None)
    totals = totals_of(rows)
    assert (totals.engines, totals.by_state, totals.lag_s_max) == (2, {"fresh": 1, "stale": 1}, 2.0)
