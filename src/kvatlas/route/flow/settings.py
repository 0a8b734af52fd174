"""The ``flowControl`` section of an EndpointPickerConfig, and what it comes to.

``FlowControl`` is read with ``msgspec.convert(section, FlowControl)``: unknown fields, bad durations and bad quantities are a
``msgspec.ValidationError`` that names the field. Source: llm-d-router, ``apix/config/v1alpha1``.
"""

from __future__ import annotations

import msgspec

from kvatlas.config.go_values import parse_go_duration, parse_quantity

Quantity = int | float | str
"""As Kubernetes writes it: 5000, "5k", "1Gi"."""

DEFAULT_FAIRNESS = "global-strict-fairness-policy"
DEFAULT_ORDERING = "fcfs-ordering-policy"
DEFAULT_USAGE_LIMIT = "static-usage-limit-policy"
DEFAULT_DETECTOR = "utilization-detector"

BAND_REQUESTS_MAX = 5_000
BAND_BYTES_MAX = 1_000_000_000
REQUEST_TTL_S = 60.0


class SaturationDetectorRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Names the plugin that says how busy the pool is."""

    plugin_ref: str = DEFAULT_DETECTOR

    @property
    def plugin(self) -> str:
        return self.plugin_ref or DEFAULT_DETECTOR


class BandLimits(msgspec.Struct, frozen=True):
    """How much may wait in one band."""

    requests: int
    bytes: int


class PriorityBand(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """What requests of one priority, or a template for priorities without a band of their own, may do."""

    priority: int = 0
    """Higher goes first. Of no meaning in a template."""
    max_bytes: Quantity | None = None
    """Bytes of bodies that may wait. None and 0: 1 GB."""
    max_requests: Quantity | None = None
    """Requests that may wait. None and 0: 5000."""
    fairness_policy_ref: str = ""
    """The plugin that chooses among tenants. Empty: ``global-strict-fairness-policy``."""
    ordering_policy_ref: str = ""
    """The plugin that orders one tenant's requests. Empty: ``fcfs-ordering-policy``."""

    def __post_init__(self) -> None:
        self.limits()

    def limits(self) -> BandLimits:
        """Return what may wait here."""
        requests, size_bytes = _quantity("maxRequests", self.max_requests), _quantity("maxBytes", self.max_bytes)
        return BandLimits(requests or BAND_REQUESTS_MAX, size_bytes or BAND_BYTES_MAX)

    @property
    def fairness_plugin(self) -> str:
        return self.fairness_policy_ref or DEFAULT_FAIRNESS

    @property
    def ordering_plugin(self) -> str:
        return self.ordering_policy_ref or DEFAULT_ORDERING


class FlowControl(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", kw_only=True):
    """The section. Without the feature gate ``flowControl`` only ``saturation_detector`` is looked at."""

    max_bytes: Quantity | None = None
    """Bytes of bodies that may wait in all bands together. None and 0: the bands' bounds only."""
    max_requests: Quantity | None = None
    default_request_ttl: str | None = msgspec.field(default=None, name="defaultRequestTTL")
    """How long a request may wait while there are endpoints. None: 60 s; "0s": as long as its client does."""
    no_endpoint_request_ttl: str | None = msgspec.field(default=None, name="noEndpointRequestTTL")
    """How long while there are none. None: as ``defaultRequestTTL``."""
    default_priority_band: PriorityBand | None = None
    default_negative_priority_band: PriorityBand | None = None
    """For priorities below 0. None: as ``defaultPriorityBand``."""
    priority_bands: tuple[PriorityBand, ...] = ()
    usage_limit_policy_plugin_ref: str = ""
    """The plugin that says up to which saturation a priority is dispatched. Empty: ``static-usage-limit-policy``."""
    saturation_detector: SaturationDetectorRef | None = None
    enable_eviction: bool = False
    """Read for compatibility: requests that were dispatched are never taken back."""

    def __post_init__(self) -> None:
        _ = self.requests_max, self.bytes_max, self.request_ttl_s, self.no_endpoint_ttl_s
        priorities = [band.priority for band in self.priority_bands]
        if twice := {priority for priority in priorities if priorities.count(priority) > 1}:
            raise ValueError(f"priorityBands has priority {min(twice)} twice; give each priority one band")

    @property
    def requests_max(self) -> int | None:
        """How many requests may wait in all bands together; None: what the bands hold."""
        return _quantity("maxRequests", self.max_requests) or None

    @property
    def bytes_max(self) -> int | None:
        return _quantity("maxBytes", self.max_bytes) or None

    @property
    def request_ttl_s(self) -> float | None:
        """Seconds that a request may wait while there are endpoints; None: as long as its client does."""
        return REQUEST_TTL_S if self.default_request_ttl is None else _duration("defaultRequestTTL", self.default_request_ttl)

    @property
    def no_endpoint_ttl_s(self) -> float | None:
        """Seconds that a request may wait while there are none; None: as long as its client does."""
        if self.no_endpoint_request_ttl is None:
            return self.request_ttl_s
        return _duration("noEndpointRequestTTL", self.no_endpoint_request_ttl)

    @property
    def detector_plugin(self) -> str:
        return DEFAULT_DETECTOR if self.saturation_detector is None else self.saturation_detector.plugin

    @property
    def usage_limit_plugin(self) -> str:
        return self.usage_limit_policy_plugin_ref or DEFAULT_USAGE_LIMIT

    def template(self, priority: int) -> PriorityBand:
        """Return what holds for a priority that has no band of its own."""
        negative = self.default_negative_priority_band if priority < 0 else None
        return negative or self.default_priority_band or PriorityBand()

    def plugin_refs(self) -> tuple[str, ...]:
        """Return the names of all plugins that the section asks for; those of llm-d's defaults need no entry in ``plugins``."""
        bands = (*self.priority_bands, self.default_priority_band, self.default_negative_priority_band, PriorityBand())
        names = [self.detector_plugin, self.usage_limit_plugin]
        for band in bands:
            if band is not None:
                names += [band.fairness_plugin, band.ordering_plugin]
        return tuple(dict.fromkeys(names))


def _quantity(field: str, value: Quantity | None) -> int:
    try:
        return 0 if value is None else parse_quantity(value)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _duration(field: str, text: str) -> float | None:
    try:
        return parse_go_duration(text) or None
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
