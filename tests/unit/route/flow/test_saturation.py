"""How busy a pool is, by what engines say or by what is in flight."""

from __future__ import annotations

import random

import pytest

from kvatlas.errors import ConfigError, NoEndpointError, SaturatedError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.flow.pool import PoolGauge
from kvatlas.route.flow.saturation import ConcurrencyDetector, SaturationDetector, UtilizationDetector
from kvatlas.route.picker_config import build_router, read_config
from kvatlas.route.request import RouteRequest
from tests.unit.route.flow.fleet import candidate, plugin


def cycle(*candidates: Candidate, now_s: float = 0.0) -> Cycle:
    return Cycle(RouteRequest(id="r", model="m"), candidates, now_s, random.Random(0))


def test_utilization_is_the_mean_of_the_scarcer_resource() -> None:
    detector = plugin(UtilizationDetector)
    assert isinstance(detector, SaturationDetector)
    assert detector.saturation([candidate("a", waiting=2, usage=0.4)], 0.0) == pytest.approx(0.5)
    assert detector.saturation([candidate("a", waiting=4, usage=0.4)], 0.0) == pytest.approx(0.8)
    pool = [candidate("a", waiting=10), candidate("b", usage=0.8), candidate("c")]
    assert detector.saturation(pool, 0.0) == pytest.approx((2 + 1 + 0) / 3)


def test_who_has_not_reported_in_time_counts_as_full() -> None:
    detector = plugin(UtilizationDetector, metricsStalenessThreshold="200ms")
    pool = [candidate("a", at_s=10.0), candidate("b", at_s=None), candidate("c", at_s=9.0)]
    assert detector.saturation(pool, 10.2) == pytest.approx(2 / 3)
    assert detector.stale(pool, 10.2) == 2
    assert detector.saturation(pool, 10.3) == 1.0


def test_no_candidates_are_full() -> None:
    assert plugin(UtilizationDetector).saturation([], 0.0) == 1.0
    assert plugin(ConcurrencyDetector).saturation([], 0.0) == 1.0


def test_the_utilization_filter_leaves_out_who_is_over_a_threshold_with_headroom() -> None:
    detector = plugin(UtilizationDetector, headroom=0.2)
    pool = [candidate("a", waiting=5), candidate("b", waiting=6), candidate("c", usage=0.95), candidate("d", usage=0.97)]
    assert [one.name for one in detector.filter(cycle(*pool), pool)] == ["a", "c"]


def test_the_utilization_filter_keeps_all_where_all_are_over() -> None:
    detector = plugin(UtilizationDetector)
    pool = [candidate("a", waiting=5), candidate("b", at_s=None)]
    assert detector.filter(cycle(*pool), pool) == pool


@pytest.mark.parametrize("age", ["0s", "200", "soon"])
def test_an_age_that_makes_no_sense_is_refused(age: str) -> None:
    with pytest.raises(ConfigError, match="metricsStalenessThreshold"):
        plugin(UtilizationDetector, metricsStalenessThreshold=age)


@pytest.mark.parametrize(("mode", "saturation"), [("requests", 0.45), ("tokens", 0.55), ("hybrid", 0.9)])
def test_concurrency_is_what_is_in_flight_over_what_may_be(mode: str, saturation: float) -> None:
    detector = plugin(ConcurrencyDetector, concurrencyMode=mode, maxConcurrency=10, maxTokenConcurrency=1000)
    pool = [candidate("a", requests=8, tokens=100), candidate("b", requests=1, tokens=1000)]
    assert detector.saturation(pool, 0.0) == pytest.approx(saturation)


def test_the_concurrency_filter_says_that_all_are_busy() -> None:
    detector = plugin(ConcurrencyDetector, maxConcurrency=10, headroom=0.2)
    pool = [candidate("a", requests=11), candidate("b", requests=12)]
    some = cycle(*pool)
    assert [one.name for one in detector.filter(some, pool)] == ["a"]
    assert not some.saturated
    none = cycle(*pool)
    assert detector.filter(none, pool[1:]) == []
    assert none.saturated


def test_the_busier_of_prefill_and_decode_counts() -> None:
    gauge = PoolGauge(plugin(ConcurrencyDetector, maxConcurrency=10))
    prefill, decode, both = (candidate(role, requests=n, role=role) for role, n in (("prefill", 9), ("decode", 1), ("both", 3)))
    assert gauge.saturation([prefill, decode], 0.0) == pytest.approx(0.9)
    assert gauge.saturation([prefill, decode, both], 0.0) == pytest.approx(0.6)
    assert gauge.saturation([decode], 0.0) == pytest.approx(0.1)


def test_a_pool_without_anybody_to_decode_is_no_busy_pool() -> None:
    gauge = PoolGauge(plugin(ConcurrencyDetector))
    assert gauge.saturation([], 0.0) is None
    assert gauge.saturation([candidate("a", role="prefill"), candidate("b", role="encode")], 0.0) is None


def test_requests_count_until_a_report_shows_them() -> None:
    gauge = PoolGauge(plugin(UtilizationDetector))
    for _ in range(3):
        gauge.sent(1.0)
    before = [candidate("a", at_s=0.95, requests=3), candidate("b", at_s=1.1)]
    assert gauge.saturation(before, 1.1) == pytest.approx(3 / 5 / 2)
    after = [candidate("a", at_s=1.1, requests=3), candidate("b", at_s=1.1)]
    assert gauge.saturation(after, 1.1) == 0.0


def test_requests_that_came_back_before_a_report_do_not_count() -> None:
    gauge = PoolGauge(plugin(UtilizationDetector))
    for _ in range(3):
        gauge.sent(1.0)
    assert gauge.saturation([candidate("a", at_s=0.95, requests=1)], 1.1) == pytest.approx(1 / 5)


def test_an_engine_that_stopped_reporting_does_not_hold_requests_unseen() -> None:
    gauge = PoolGauge(plugin(UtilizationDetector))
    gauge.sent(1.0)
    pool = [candidate("a", at_s=0.1), candidate("b", at_s=1.1, requests=9)]
    assert gauge.saturation(pool, 1.1) == pytest.approx(0.5)


LIMITED = """
plugins:
- {type: concurrency-detector, parameters: {maxConcurrency: 1}}
- {type: decode-filter}
- {type: random-picker}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: decode-filter}, {pluginRef: concurrency-detector}, {pluginRef: random-picker}]}
"""


def test_a_decision_among_busy_endpoints_only_is_429_and_among_none_503() -> None:
    router = build_router(read_config(LIMITED))
    router.set_endpoints([candidate("a").endpoint])
    router.decide(RouteRequest(id="first", model="m"))
    with pytest.raises(SaturatedError) as busy:
        router.decide(RouteRequest(id="second", model="m"))
    assert busy.value.status == 429
    router.set_endpoints([candidate("p", role="prefill").endpoint])
    with pytest.raises(NoEndpointError) as nobody:
        router.decide(RouteRequest(id="third", model="m"))
    assert nobody.value.status == 503
