"""One run: all that it depends on, and what runs it."""

from __future__ import annotations

import msgspec

from kvatlas.sim.changes import Change
from kvatlas.sim.choice import make_engines
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.events import EventPath
from kvatlas.sim.fleet import REPORT_EVERY_S, simulate
from kvatlas.sim.results import RunResult
from kvatlas.sim.workloads.catalog import Choice
from kvatlas.sim.workloads.clients import Clients, Impatient
from kvatlas.sim.workloads.foreign import Beside, Strays
from kvatlas.sim.workloads.workload import Workload


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
    report_every_s: float = REPORT_EVERY_S
    """How often engines' metrics are read."""
    patience_s: float | None = None
    cancel_share: float = 0.0
    cancel_after_s: float = 5.0
    """These three: see :class:`kvatlas.sim.workloads.clients.Clients`."""
    foreign_share: float = 0.0
    """Share of the workload's requests that reach any engine without passing the router."""
    foreign: Choice | None = None
    """A workload of which no request passes the router."""
    foreign_engines: tuple[int, ...] = ()
    """Where these go, in turns; none: to all that are there at the beginning."""
    changes: tuple[Change, ...] = ()
    """What happens to engines."""
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
        workload(plan),
        plan.policy,
        [plan.spec] * plan.engines,
        seed=plan.seed,
        engines=make_engines(),
        report_every_s=plan.report_every_s,
        changes=plan.changes,
        path=EventPath(lag_s=plan.event_lag_s, loss=plan.event_loss),
        in_flight_max=plan.in_flight_max,
    )
    return msgspec.structs.replace(result, scale=plan.scale, label=plan.label)


def workload(plan: Plan) -> Workload:
    """Return all that reaches a plan's engines, whether or not it passes the router."""
    made, everywhere = plan.workload.open(seed=plan.seed, scale=plan.scale, requests_max=plan.limit), range(plan.engines)
    clients = Clients(patience_s=plan.patience_s, cancel_share=plan.cancel_share, cancel_after_s=plan.cancel_after_s)
    if clients.patience_s is not None or clients.cancel_share:
        made = Impatient(made, clients, plan.seed)
    if plan.foreign_share:
        made = Strays(made, plan.foreign_share, everywhere, plan.seed)
    if plan.foreign is not None:
        made = Beside(made, plan.foreign.open(seed=plan.seed), plan.foreign_engines or everywhere)
    return made
