"""From what was asked to the runs that answer it: each policy with each combination of what is varied."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from kvatlas.errors import ConfigError
from kvatlas.route.parameters import read_parameters, unknown_name
from kvatlas.sim.changes import Change, EngineJoins
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.fleet import REPORT_EVERY_S
from kvatlas.sim.plan import Plan
from kvatlas.sim.workloads.catalog import choose, names_of_parameters

RUNS_MAX = 10_000


class Axis(NamedTuple):
    """Something that is varied."""

    name: str
    values: tuple[object, ...]


class Foreign(NamedTuple):
    """Requests that reach engines without passing the router."""

    workload: str
    """A name, or a trace's file."""
    engines: tuple[int, ...]
    """Where they go; none: everywhere."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What a user asks. ``values`` are set by name: of the run, of its workload, of its engines."""

    policies: tuple[str, ...]
    workload: str
    """A name, or a trace's file."""
    spec: EngineSpec
    values: Mapping[str, object]
    axes: tuple[Axis, ...] = ()
    foreign: Foreign | None = None
    changes: tuple[Change, ...] = ()
    """Engines that join are as those of the run."""


class _OfRun(msgspec.Struct, frozen=True, kw_only=True):
    engines: Annotated[int, Meta(ge=1, le=10_000)] = 8
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    scale: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    limit: Annotated[int, Meta(ge=1)] | None = None
    report_every_s: Annotated[float, Meta(ge=0.001, le=1e9)] = REPORT_EVERY_S
    patience_s: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    cancel_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    cancel_after_s: Annotated[float, Meta(gt=0, le=1e6)] = 5.0
    foreign_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    event_lag_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    event_loss: Annotated[float, Meta(ge=0, le=1)] = 0.0
    in_flight_max: Annotated[int, Meta(ge=1)] | None = None


_RUN = [field.name for field in msgspec.structs.fields(_OfRun)]
_SPEC = [field.name for field in msgspec.structs.fields(EngineSpec) if field.name not in ("costs", "tiers")]
_FOREIGN = "foreign."
"""Before the name of a parameter: it is the foreign workload's."""
_COSTS = [f"costs.{field.name}" for field in msgspec.structs.fields(EngineCosts)]


def plans(question: Question) -> list[Plan]:
    """Return the runs: those that are compared with each other stand together. ConfigError for what cannot be set so."""
    for axis in question.axes:
        if axis.name in question.values:
            raise ConfigError(axis.name, "is set and varied", "one of both: give it once")
    combinations = list(itertools.product(*(axis.values for axis in question.axes)))
    runs = len(combinations) * len(question.policies)
    if runs > RUNS_MAX:
        raise ConfigError("sweep", f"makes {runs} runs", f"at most {RUNS_MAX}; vary less at once")
    made = []
    for combination in combinations:
        varied = dict(zip((axis.name for axis in question.axes), combination, strict=True))
        label = " ".join(f"{name}={_shown(value)}" for name, value in varied.items())
        made += _plans(question, {**question.values, **varied}, label)
    return made


def names(workload: str, foreign: Foreign | None = None) -> list[str]:
    """Return all that can be set and varied."""
    of_foreign = [] if foreign is None else [_FOREIGN + name for name in names_of_parameters(foreign.workload)]
    return [*names_of_parameters(workload), *_RUN, *_SPEC, *_COSTS, *of_foreign]


def value_of(text: str) -> object:
    """Return a value as it is written on a command line: a number, true, false, null or text."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return value if isinstance(value, int | float | bool | None) else text


def _plans(question: Question, values: Mapping[str, object], label: str) -> list[Plan]:
    known, foreign = names(question.workload, question.foreign), question.foreign
    for name in values:
        if foreign is None and name.startswith(_FOREIGN):
            raise ConfigError(name, "is set without --foreign", "--foreign WORKLOAD, of which it is a parameter")
        if name not in known:
            raise unknown_name(name, f"parameter of {question.workload}, the run or its engines", name, known)
    parameters = names_of_parameters(question.workload)
    of_workload = {name: value for name, value in values.items() if name in parameters}
    choice = choose(question.workload, of_workload)
    of_run = read_parameters(_OfRun, {name: value for name, value in values.items() if name in _RUN}, "")
    spec = _spec(question.spec, values)
    same: dict[str, Any] = msgspec.structs.asdict(of_run)
    if foreign is not None:
        of_foreign = {name.removeprefix(_FOREIGN): value for name, value in values.items() if name.startswith(_FOREIGN)}
        same |= {"foreign": choose(foreign.workload, of_foreign), "foreign_engines": foreign.engines}
        _check_engines("--foreign", foreign.engines, of_run.engines, question.changes)
    named = [change.engine for change in question.changes if not isinstance(change, EngineJoins)]
    _check_engines("--at", named, of_run.engines, question.changes)
    same["changes"] = tuple(
        msgspec.structs.replace(change, spec=spec) if isinstance(change, EngineJoins) else change for change in question.changes
    )
    return [Plan(policy=policy, workload=choice, spec=spec, label=label, **same) for policy in question.policies]


def _check_engines(option: str, named: Sequence[int], engines: int, changes: Sequence[Change]) -> None:
    """Raise ConfigError for an engine that never is there. One that comes too late or has left is found as it runs."""
    there = engines + sum(isinstance(change, EngineJoins) for change in changes)
    for engine in named:
        if engine >= there:
            raise ConfigError(option, f"there is no engine {engine}", f"0 to {there - 1}; TIME:join adds engines")


def _spec(spec: EngineSpec, values: Mapping[str, object]) -> EngineSpec:
    tree = msgspec.json.decode(msgspec.json.encode(spec))
    for name, value in values.items():
        if name in _SPEC:
            tree[name] = value
        elif name in _COSTS:
            tree["costs"][name.removeprefix("costs.")] = value
    return read_parameters(EngineSpec, tree, "")


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
