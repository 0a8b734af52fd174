"""What the ``flowControl`` section comes to once its plugins are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.flow.band import BandPlan
from kvatlas.route.flow.policies import FairnessPolicy, OrderingPolicy
from kvatlas.route.flow.saturation import SaturationDetector
from kvatlas.route.flow.settings import FlowControl, PriorityBand
from kvatlas.route.flow.usage_limits import UsageLimitPolicy


class FlowPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How requests wait."""

    bands: Mapping[int, BandPlan]
    """Of the priorities that have one of their own."""
    default_band: BandPlan
    negative_band: BandPlan
    requests_max: int | None
    """In all bands together; None: what the bands hold."""
    bytes_max: int | None
    ttl_s: float | None
    """How long a request may wait while there are endpoints; None: as long as its client does."""
    no_endpoint_ttl_s: float | None
    usage_limit: UsageLimitPolicy

    def band(self, priority: int) -> BandPlan:
        return self.bands.get(priority, self.negative_band if priority < 0 else self.default_band)


def plan_of(settings: FlowControl, plugin: Callable[[str], object]) -> FlowPlan:
    """Return the plan. ``plugin`` returns plugins by name; ConfigError where one is not there or does something else."""

    def band_plan(band: PriorityBand, path: str) -> BandPlan:
        limits = band.limits()
        fairness = _of_kind(plugin, band.fairness_plugin, FairnessPolicy, f"{path}.fairnessPolicyRef")
        ordering = _of_kind(plugin, band.ordering_plugin, OrderingPolicy, f"{path}.orderingPolicyRef")
        return BandPlan(limits.requests, limits.bytes, fairness, ordering)

    bands = {band.priority: band_plan(band, "flowControl.priorityBands") for band in settings.priority_bands}
    return FlowPlan(
        bands=bands,
        default_band=band_plan(settings.template(0), "flowControl.defaultPriorityBand"),
        negative_band=band_plan(settings.template(-1), "flowControl.defaultNegativePriorityBand"),
        requests_max=settings.requests_max,
        bytes_max=settings.bytes_max,
        ttl_s=settings.request_ttl_s,
        no_endpoint_ttl_s=settings.no_endpoint_ttl_s,
        usage_limit=_of_kind(plugin, settings.usage_limit_plugin, UsageLimitPolicy, "flowControl.usageLimitPolicyPluginRef"),
    )


def detector_of(settings: FlowControl, plugin: Callable[[str], object]) -> SaturationDetector:
    """Return the saturation detector, which is used with and without flow control. ConfigError as for :func:`plan_of`."""
    path = "flowControl.saturationDetector.pluginRef"
    detector: SaturationDetector = _of_kind(plugin, settings.detector_plugin, SaturationDetector, path)
    return detector


def _of_kind(plugin: Callable[[str], object], name: str, kind: type[Any], path: str) -> Any:
    found = plugin(name)
    if not isinstance(found, kind):
        raise ConfigError(path, f"plugin {name!r} is no {kind.__name__}", f"the name of a plugin that is a {kind.__name__}")
    return found
