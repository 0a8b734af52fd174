"""Endpoints with a given load, and plugins with given parameters."""

from __future__ import annotations

import random
from typing import Any

from kvatlas.route.cycle import Candidate
from kvatlas.route.endpoint import ROLE_LABEL, Endpoint, EndpointName
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
