"""Endpoints with a given load, and plugins with given parameters."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from kvatlas.route.cycle import Candidate
from kvatlas.route.endpoint import ROLE_LABEL, Endpoint, EndpointName
from kvatlas.route.flow.band import BandPlan
from kvatlas.route.flow.plan import FlowPlan
from kvatlas.route.flow.usage_limits import StaticUsageLimit
from kvatlas.route.load import EngineReport, InFlight, Load
from kvatlas.route.parameters import read_parameters
from kvatlas.route.plugins import Services
from kvatlas.types import PodId


def _no_plugin(name: str) -> object:
    raise AssertionError(name)


SERVICES = Services(plugin=_no_plugin, clock=lambda: 0.0, random=random.Random(0))


def plugin(kind: Any, **parameters: Any) -> Any:
    """Return a plugin with parameters as a configuration has them."""
    return kind(kind.__name__, read_parameters(kind.Parameters, parameters, kind.__name__), SERVICES)


def one_band(band: BandPlan, **more: Any) -> FlowPlan:
    """Return a plan with the same band for all priorities. ``more``: other fields."""
    usual = FlowPlan(
        bands={},
        default_band=band,
        negative_band=band,
        requests_max=None,
        bytes_max=None,
        ttl_s=60.0,
        no_endpoint_ttl_s=60.0,
        usage_limit=plugin(StaticUsageLimit),
    )
    return msgspec.structs.replace(usual, **more)


def candidate(
    name: str,
    *,
    waiting: int = 0,
    usage: float = 0.0,
    at_s: float | None = 0.0,
    requests: int = 0,
    tokens: int = 0,
    role: str | None = None,
) -> Candidate:
    """``at_s``: when it reported; None: never."""
    report = None if at_s is None else EngineReport(at_s=at_s, waiting=waiting, kv_usage=usage)
    endpoint = Endpoint(
        name=EndpointName(name),
        address="10.0.0.1",
        port=8000,
        pod=PodId(name),
        labels={} if role is None else {ROLE_LABEL: role},
    )
    return Candidate(endpoint, Load(report, InFlight(requests=requests, tokens=tokens)))
