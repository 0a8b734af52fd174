"""The section flowControl is read as llm-d reads it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvatlas.errors import ConfigError
from kvatlas.route.flow.plan import FlowPlan, detector_of, plan_of
from kvatlas.route.flow.policies import EdfOrdering, FcfsOrdering, GlobalStrictFairness, RoundRobinFairness
from kvatlas.route.flow.saturation import UtilizationDetector
from kvatlas.route.flow.settings import FlowControl
from kvatlas.route.flow.usage_limits import PriorityHoldback, SoftReflectiveCeiling, StaticUsageLimit
from tests.unit.route.flow.fleet import SERVICES, plugin

PLUGINS = {
    "fcfs-ordering-policy": plugin(FcfsOrdering),
    "edf-ordering-policy": plugin(EdfOrdering),
    "global-strict-fairness-policy": plugin(GlobalStrictFairness),
    "round-robin-fairness-policy": plugin(RoundRobinFairness),
    "static-usage-limit-policy": plugin(StaticUsageLimit),
    "utilization-detector": plugin(UtilizationDetector),
    "holdback": plugin(PriorityHoldback, minCeiling=0.5),
}


def read(**section: Any) -> FlowControl:
    return msgspec.convert(section, FlowControl)


def plan(**section: Any) -> FlowPlan:
    return plan_of(read(**section), PLUGINS.__getitem__)


def test_an_empty_section_has_llm_ds_defaults() -> None:
    found = plan()
    assert (found.ttl_s, found.no_endpoint_ttl_s, found.requests_max, found.bytes_max) == (60, 60, None, None)
    band = found.band(3)
    assert (band.requests_max, band.bytes_max) == (5000, 10**9)
    assert isinstance(band.fairness, GlobalStrictFairness)
    assert isinstance(band.ordering, FcfsOrdering)
    assert isinstance(detector_of(read(), PLUGINS.__getitem__), UtilizationDetector)


def test_a_zero_bound_of_a_band_is_the_default_and_a_zero_global_bound_is_none() -> None:
    found = plan(maxRequests=0, maxBytes="0", defaultPriorityBand={"maxRequests": 0, "maxBytes": 0})
    assert (found.requests_max, found.bytes_max) == (None, None)
    assert (found.band(0).requests_max, found.band(0).bytes_max) == (5000, 10**9)


def test_a_request_without_time_limit_waits_as_long_as_its_client() -> None:
    found = plan(defaultRequestTTL="0s")
    assert (found.ttl_s, found.no_endpoint_ttl_s) == (None, None)
    found = plan(defaultRequestTTL="30s", noEndpointRequestTTL="10m")
    assert (found.ttl_s, found.no_endpoint_ttl_s) == (30, 600)
    assert plan(defaultRequestTTL="30s").no_endpoint_ttl_s == 30
    assert plan(noEndpointRequestTTL="5s").ttl_s == 60


def test_priorities_without_a_band_have_the_template_of_their_sign() -> None:
    found = plan(
        defaultPriorityBand={"maxRequests": "1k"},
        defaultNegativePriorityBand={"maxRequests": 5},
        priorityBands=[
            {"priority": -2, "maxRequests": 7, "maxBytes": "1Gi", "fairnessPolicyRef": "round-robin-fairness-policy"}
        ],
    )
    assert [found.band(priority).requests_max for priority in (9, 0, -1, -2)] == [1000, 1000, 5, 7]
    assert found.band(-2).bytes_max == 1 << 30
    assert isinstance(found.band(-2).fairness, RoundRobinFairness)
    assert plan(defaultPriorityBand={"maxRequests": 3}).band(-1).requests_max == 3


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"maxQueue": 1}, "maxQueue"),
        ({"defaultRequestTTL": "60"}, "defaultRequestTTL: '60' is no duration"),
        ({"noEndpointRequestTTL": "-1s"}, "noEndpointRequestTTL: '-1s' is no duration"),
        ({"maxBytes": "1GB"}, "maxBytes: '1GB' is no quantity"),
        ({"priorityBands": [{"priority": 1, "maxRequests": -1}]}, r"maxRequests: -1 is no quantity.*priorityBands\[0\]"),
        ({"priorityBands": [{"priority": 1}, {"priority": 1}]}, "priority 1 twice"),
        ({"priorityBands": [{"priority": "high"}]}, "priorityBands"),
        ({"enableEviction": "yes"}, "enableEviction"),
    ],
)
def test_a_wrong_section_is_refused_by_name(section: dict[str, Any], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        read(**section)


def test_a_plugin_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"flowControl.defaultPriorityBand.orderingPolicyRef.*is no OrderingPolicy"):
        plan(defaultPriorityBand={"orderingPolicyRef": "round-robin-fairness-policy"})
    with pytest.raises(ConfigError, match=r"saturationDetector\.pluginRef"):
        detector_of(read(saturationDetector={"pluginRef": "holdback"}), PLUGINS.__getitem__)


def test_the_plugins_that_a_section_needs_are_known_by_name() -> None:
    found = read(
        usageLimitPolicyPluginRef="holdback",
        saturationDetector={},
        defaultPriorityBand={"fairnessPolicyRef": "round-robin-fairness-policy"},
    )
    assert found.plugin_refs() == (
        "utilization-detector",
        "holdback",
        "round-robin-fairness-policy",
        "fcfs-ordering-policy",
        "global-strict-fairness-policy",
    )


def test_holdback_needs_a_floor_below_its_ceiling() -> None:
    with pytest.raises(ConfigError, match="minCeiling"):
        PriorityHoldback("h", PriorityHoldback.Parameters(min_ceiling=0.9, max_ceiling=0.8), SERVICES)


def test_holdback_spreads_ceilings_by_rank_or_by_value() -> None:
    by_rank = plugin(PriorityHoldback, minCeiling=0.4, maxCeiling=0.9)
    assert by_rank.ceilings(0.5, [100, 1, 0]) == pytest.approx([0.9, 0.65, 0.4])
    by_value = plugin(PriorityHoldback, minCeiling=0.4, maxCeiling=0.9, domain="value")
    assert by_value.ceilings(0.5, [100, 1, 0]) == pytest.approx([0.9, 0.405, 0.4])
    assert by_value.ceilings(0.5, [-7]) == [0.9]
    assert plugin(StaticUsageLimit, threshold=0.7).ceilings(0.1, [1, 0]) == [0.7, 0.7]


def test_a_soft_ceiling_sinks_with_saturation_and_with_rank() -> None:
    soft = plugin(SoftReflectiveCeiling)
    assert soft.ceilings(0.49, [2, 1, 0]) == [1, 1, 1]
    assert soft.ceilings(0.65, [2, 1, 0]) == [1, 1, 0]
    assert soft.ceilings(0.65, [2, 1, 0]) == [1, 1, 1]  # every second look: 0.65 / 0.35 is nearly 2
    assert soft.ceilings(1.0, [2, 1, 0]) == [1, 0, 0]
    assert soft.ceilings(0.9, [7]) == [1]
    assert soft.ceilings(0.9, []) == []


@pytest.mark.parametrize(("saturation", "looks"), [(0.5, 1), (0.65, 2), (0.75, 3), (0.9, 9)])
def test_beyond_a_soft_ceiling_a_share_of_looks_lets_all_lower_priorities_go(saturation: float, looks: int) -> None:
    soft = plugin(SoftReflectiveCeiling)
    seen = [soft.ceilings(saturation, [3, 2, 1, 0])[-1] for _ in range(4 * looks)]
    assert sum(seen) == 4
    assert all(limits == sorted(limits, reverse=True) for limits in (soft.ceilings(saturation, [3, 2, 1, 0]) for _ in range(9)))
