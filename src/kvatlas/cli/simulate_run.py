"""What ``kvatlas simulate`` does: a command line to a question, its runs, and what is shown of them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvatlas.cli.screen import screen, show_json, show_table
from kvatlas.cli.simulate_tables import tables
from kvatlas.config.quantities import parse_duration
from kvatlas.errors import RequestError
from kvatlas.index.choice import describe_core, why_no_native
from kvatlas.route.parameters import unknown_name
from kvatlas.route.picker_config import load_config
from kvatlas.sim.batch import Outcome, outcomes
from kvatlas.sim.changes import Change, EngineJoins, EngineLeaves, EngineSlows
from kvatlas.sim.checks import check_factor
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.plan import Plan
from kvatlas.sim.policies import POLICIES
from kvatlas.sim.presets import preset_spec
from kvatlas.sim.report import check, write
from kvatlas.sim.results import RunResult
from kvatlas.sim.spec_file import read_spec
from kvatlas.sim.sweep import Axis, Foreign, Question, plans, value_of

FAULTS = 1
"""Exit status where a run could not be done."""
WORKLOAD = "chats"
PRESET = "qwen3-32b-2xh100"
CHANGES = "give TIME:join, TIME:leave:ENGINE or TIME:slow:ENGINE:FACTOR, as 60s:slow:2:10; the first engine is 0"
COMPARED = ("kvatlas", "llm-d-precise", "llm-d-default", "least-load", "random")
"""What is compared where no policy is named."""


def ask(
    workload: str | None,
    policies: Sequence[str],
    preset: str | None,
    spec: Path | None,
    values: Mapping[str, object],
    settings: Sequence[str],
    sweep: Sequence[str],
    at: Sequence[str] = (),
    foreign: str | None = None,
) -> Question:
    """Return the question of a command line: RequestError or ConfigError for what is none. ``values`` beat ``settings``."""
    engine = _spec(preset, spec)
    return Question(
        policies=_policies(policies),
        workload=workload or WORKLOAD,
        spec=engine,
        values={**dict(_assigned("--set", text) for text in settings), **values},
        axes=tuple(_axis(text) for text in sweep),
        changes=tuple(_change(text, engine) for text in at),
        foreign=None if foreign is None else _foreign(foreign),
    )


def _policies(given: Sequence[str]) -> tuple[str, ...]:
    if "all" in given:
        return tuple(POLICIES)
    for name in given:
        if Path(name).suffix in (".yaml", ".yml", ".json"):
            load_config(name)
        elif name not in POLICIES:
            raise unknown_name("--policy", "policy", name, ["all", *POLICIES])
    return tuple(dict.fromkeys(given or COMPARED))


def _spec(preset: str | None, file: Path | None) -> EngineSpec:
    if file is None:
        return preset_spec(preset or PRESET)
    if preset is not None:
        raise RequestError("--spec", "and --preset are two engines", "give one of both; --set changes single fields")
    if not file.is_file():
        raise RequestError("--spec", f"{file} cannot be read: there is no such file", "name a YAML or JSON file of an engine")
    return read_spec(file)


def _assigned(option: str, text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise RequestError(option, f"{text!r} sets nothing", "give NAME=VALUE, as groups=50")
    return name.replace("-", "_"), value_of(value)


def _axis(text: str) -> Axis:
    name, separator, values = text.partition("=")
    if not separator or not name or not values:
        raise RequestError("--sweep", f"{text!r} varies nothing", "give NAME=V1,V2, as gpu_blocks=10000,20000")
    return Axis(name.replace("-", "_"), tuple(value_of(value) for value in values.split(",")))


def _change(text: str, joining: EngineSpec) -> Change:
    """Return what happens to an engine: ``TIME:join``, ``TIME:leave:ENGINE`` or ``TIME:slow:ENGINE:FACTOR``."""
    at_s, *said = text.split(":")
    try:
        time_s = parse_duration(at_s)
        match said:
            case ["join"]:
                return EngineJoins(time_s, joining)
            case ["leave", engine]:
                return EngineLeaves(time_s, _engine(engine))
            case ["slow", engine, factor]:
                check_factor(float(factor))
                return EngineSlows(time_s, _engine(engine), float(factor))
    except ValueError as error:
        raise RequestError("--at", f"{text!r}: {error}", CHANGES) from None
    raise RequestError("--at", f"{text!r} is no change", CHANGES)


def _engine(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is no engine's number")
    return int(text)


def _foreign(text: str) -> Foreign:
    """Return a workload that goes to some engines, as ``no-reuse@0,2``, or to all."""
    workload, _, engines = text.rpartition("@")
    try:
        return Foreign(workload, tuple(_engine(engine) for engine in engines.split(","))) if workload else Foreign(text, ())
    except ValueError as error:
        raise RequestError("--foreign", f"{text!r}: {error}", "number engines behind an @, as no-reuse@0,2") from None


def show(question: Question, *, jobs: int | None, as_json: bool, report: Path | None) -> None:
    """Run what was asked and show what came of it. typer.Exit(1) where a run failed, or Ctrl-C ended them."""
    asked = plans(question)
    if report is not None:
        check(report)
    errors = screen(stderr=True)
    if why_no_native() is not None:
        errors.print(f"slower than it could be: {describe_core()}", style="yellow", soft_wrap=True)
    found, stopped = _outcomes(asked, jobs or os.cpu_count() or 1)
    found.sort(key=lambda outcome: asked.index(outcome.plan))
    done = [(outcome.plan, outcome.result) for outcome in found if outcome.result is not None]
    problems = [f"{_name(outcome.plan)}: {outcome.problem}" for outcome in found if outcome.result is None]
    if as_json:
        for plan, result in done:
            show_json(_line(plan, result))
        show_json({"summary": {"command": _command(), "runs": len(asked), "finished": len(done), "problems": problems}})
    elif done:
        show_table(lambda width: tables([result for _, result in done], width))
    for problem in problems:
        errors.print(f"failed: {problem}", style="bold red", soft_wrap=True)
    if stopped:
        errors.print(f"stopped: {len(done)} of {len(asked)} runs are finished", style="yellow")
    if report is not None and done:
        write(report, done, _command())
        errors.print(f"report: {report}", soft_wrap=True)
    if problems or stopped:
        raise typer.Exit(FAULTS)


def _outcomes(asked: Sequence[Plan], jobs: int) -> tuple[list[Outcome], bool]:
    """Return what came of the runs, and whether Ctrl-C ended them before all were finished."""
    found: list[Outcome] = []
    console = screen(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("simulating", total=len(asked))
        try:
            for outcome in outcomes(asked, jobs):
                found.append(outcome)
                progress.advance(task)
                if progress.disable:
                    console.print(f"{len(found)} of {len(asked)}: {_name(outcome.plan)}", soft_wrap=True)
        except KeyboardInterrupt:
            return found, True
    return found, False


def _name(plan: Plan) -> str:
    return f"{plan.policy} {plan.label}".strip()


def _line(plan: Plan, result: RunResult) -> dict[str, Any]:
    """Return a run's JSON object: the result, what follows from it, and all that reproduces it."""
    derived = ("output_tokens_per_s", "requests_per_s", "hit_ratio", "imbalance")
    phases = [
        {**msgspec.to_builtins(phase), "output_tokens_per_s": phase.output_tokens_per_s, "hit_ratio": phase.hit_ratio}
        for phase in result.phases
    ]
    return {
        **msgspec.to_builtins(result),
        **{name: getattr(result, name) for name in derived},
        "phases": phases,
        "plan": msgspec.to_builtins(plan),
    }


def _command() -> str:
    return shlex.join(["kvatlas", *sys.argv[1:]])
