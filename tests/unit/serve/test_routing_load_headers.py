"""Load that answers tell: what is taken, what is left as polls said it, and what a client sees of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.route.load import EngineReport
from kvatlas.route.picker_config import build_router, read_config
from kvatlas.route.router import Router
from kvatlas.serve.routing.load_headers import LoadHeaders
from kvatlas.serve.routing.metrics import RoutingMetrics

TOLD = {"endpoint-load-metrics": 'JSON {"named_metrics": {"kv_cache_usage_perc": 0.4, "num_requests_waiting": 3.0}}'}
NOW_S = 20.0


class Site:
    """A router with one address, and what learns from its answers."""

    def __init__(self, url: str = "http://10.0.0.1:8000", *, ask: bool = True) -> None:
        self.router: Router = build_router(read_config(""), clock=lambda: NOW_S)
        self.router.set_endpoints(pool_from_urls([url]).endpoints)
        self.endpoint = self.router.endpoints[0]
        self.registry = CollectorRegistry()
        self.headers = LoadHeaders(self.router, RoutingMetrics(self.registry), ask=ask, clock=lambda: NOW_S)

    def learn(self, answer: Mapping[str, str]) -> bool:
        return self.headers.learn(self.endpoint, answer)

    @property
    def report(self) -> EngineReport | None:
        return self.router.load(self.endpoint.name).report

    def counted(self, outcome: str) -> float | None:
        return self.registry.get_sample_value("kvatlas_route_load_headers_total", {"outcome": outcome})


def polled(**more: Any) -> EngineReport:
    said = {"waiting": 9, "running": 7, "kv_usage": 0.9, "block_size_tokens": 16, "gpu_blocks": 512}
    return EngineReport(at_s=10.0, loras_running=frozenset({"law"}), **{**said, **more})


def test_what_a_header_does_not_tell_stays_as_it_was_polled() -> None:
    one = Site()
    one.router.report(one.endpoint.name, polled())
    assert one.learn(TOLD)
    expected = EngineReport(
        at_s=NOW_S,
        waiting=3,
        running=7,
        kv_usage=0.4,
        block_size_tokens=16,
        gpu_blocks=512,
        loras_running=frozenset({"law"}),
    )
    assert one.report == expected
    assert one.counted("taken") == 1


def test_a_header_that_tells_enough_is_a_report_where_nothing_was_polled() -> None:
    one = Site()
    assert one.learn(TOLD)
    assert one.report == EngineReport(at_s=NOW_S, waiting=3, kv_usage=0.4)


def test_a_header_that_tells_too_little_is_none() -> None:
    one = Site()
    assert not one.learn({"endpoint-load-metrics": "TEXT named_metrics.kv_cache_utilization=0.4"})
    assert one.report is None
    assert one.counted("left_out") == 1


def test_one_rank_of_several_is_not_taken_for_all() -> None:
    one = Site("http://10.0.0.1:8000?dpRanks=2")
    assert one.endpoint.names_rank
    assert not one.learn(TOLD)
    assert one.report is None


@pytest.mark.parametrize("value", ["", "JSON {", "YAML a: 1", 'JSON {"named_metrics": {"num_requests_waiting": -1}}'])
def test_a_header_that_makes_no_sense_changes_nothing_and_is_counted(value: str) -> None:
    one = Site()
    one.router.report(one.endpoint.name, polled())
    assert not one.learn({"endpoint-load-metrics": value})
    assert one.report == polled()
    assert one.counted("unreadable") == 1


def test_an_answer_without_the_header_costs_no_count() -> None:
    one = Site()
    assert not one.learn({"content-type": "application/json"})
    assert [one.counted(outcome) for outcome in ("taken", "left_out", "unreadable")] == [None] * 3


def test_engines_are_asked_where_the_setting_says_so_and_in_the_clients_format_where_it_asked_itself() -> None:
    assert Site().headers.to_engine({}) == {"endpoint-load-metrics-format": "JSON"}
    assert Site().headers.to_engine({"endpoint-load-metrics-format": "TEXT"}) == {}
    assert Site(ask=False).headers.to_engine({}) == {}


def test_only_a_client_that_asked_sees_the_answer() -> None:
    one = Site()
    assert set(one.headers.hidden({})) == {"endpoint-load-metrics", "endpoint-load-metrics-bin"}
    assert not one.headers.hidden({"endpoint-load-metrics-format": "TEXT"})
