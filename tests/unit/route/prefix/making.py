"""Endpoints, cycles and decisions for tests of producers, without a scheduler around them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import EngineReport, Load
from kvatlas.route.plugins import Services
from kvatlas.route.request import RouteRequest
from kvatlas.types import DpRank, PodId

MODEL = "tiny-llama"


def no_plugin(name: str) -> object:
    raise AssertionError(f"no plugin is called {name} here")


def services(**given: Any) -> Services:
    return Services(**{"plugin": no_plugin, "clock": lambda: 0.0, "random": random.Random(1), **given})


def endpoint(pod: str, *, name: str | None = None, address: str = "10.0.0.1", port: int = 8000, rank: int = 0) -> Endpoint:
    named = EndpointName(name or f"default/{pod}")
    return Endpoint(name=named, address=address, port=port, pod=PodId(pod), dp_rank=DpRank(rank))


def request(tokens: Iterable[int] | None = None, **fields: Any) -> RouteRequest:
    token_ids = None if tokens is None else array("I", tokens)
    return RouteRequest(id="r", **{"model": MODEL, "token_ids": token_ids, **fields})


def cycle(asked: RouteRequest, endpoints: Sequence[Endpoint], report: EngineReport | None = None, now_s: float = 0.0) -> Cycle:
    candidates = tuple(Candidate(one, Load(report)) for one in endpoints)
    return Cycle(asked, candidates, now_s, random.Random(1))


def decision(made: Cycle, target: Endpoint, prefill: Endpoint | None = None) -> Decision:
    return Decision(request=made.request, at_s=0.0, targets=(target,), prefill=prefill, runs={}, matches=made.matches)
