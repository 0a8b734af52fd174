"""One run: all that it depends on, and what runs it."""

from __future__ import annotations

import msgspec

from kvatlas.sim.choice import make_engines
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.events import EventPath
from kvatlas.sim.fleet import simulate
from kvatlas.sim.results import RunResult
from kvatlas.sim.workloads.catalog import Choice


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One policy under one workload. Picklable, so that another process may run it; equal plans have equal results."""

    policy: str
    workload: Choice
    spec: EngineSpec
    """Of every engine."""
    engines: int = 8
    seed: int = 0
    scale: float = 1.0
    """Arrivals are so many times as dense."""
    limit: int | None = None
    """Requests, after which nothing more comes."""
    event_lag_s: float = 0.0
    """From what an engine does to the event that tells of it."""
    event_loss: float = 0.0
    """Share of messages with events that are lost."""
    in_flight_max: int | None = None
    """Requests in flight, beyond which whoever comes is refused. None: no bound."""
    label: str = ""
    """What was varied, as ``name=value``."""


def run(plan: Plan) -> RunResult:
    """Run it. ValueError for engines that cannot be; RequestError for a bad line of a trace."""
    result = simulate(
        plan.workload.open(seed=plan.seed, scale=plan.scale, requests_max=plan.limit),
        plan.policy,
        [plan.spec] * plan.engines,
        seed=plan.seed,
        engines=make_engines(),
        path=EventPath(lag_s=plan.event_lag_s, loss=plan.event_loss),
        in_flight_max=plan.in_flight_max,
    )
    return msgspec.structs.replace(result, scale=plan.scale, label=plan.label)
