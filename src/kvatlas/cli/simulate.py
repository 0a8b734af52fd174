"""``kvatlas simulate``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvatlas.cli.options import AsJson, duration
from kvatlas.cli.screen import quiet_logs, screen, show_json, show_table
from kvatlas.errors import RequestError
from kvatlas.sim.batch import Outcome, outcomes
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.plan import Plan
from kvatlas.sim.sweep import Axis, Question, plans, value_of

FAULTS = 1
"""Exit status where a run could not be done."""
WORKLOAD = "chats"
POLICIES = ("kvatlas", "llm-d-precise", "llm-d-default", "least-load", "random")
"""What is compared where no policy is named."""


def simulate(
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload", "-w", help="Who sends what: a name from --list, or a trace's file.  [chats]", metavar="NAME|FILE"
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            help="Who decides where requests go: names from --list, files of EndpointPickerConfigs, all. Can be repeated.",
            metavar="NAME|FILE",
        ),
    ] = None,
    engines: Annotated[int | None, typer.Option("--engines", "-n", help="Engines, all alike.  [8]", metavar="COUNT")] = None,
    preset: Annotated[str | None, typer.Option(help="A model on a GPU, from --list.", metavar="NAME")] = None,
    spec: Annotated[
        Path | None,
        typer.Option(help="An engine of your own, YAML or JSON, as `kvatlas calibrate` writes it.", metavar="FILE"),
    ] = None,
    qps: Annotated[float | None, typer.Option(help="Requests a second. Traces have their own: see --scale.")] = None,
    scale: Annotated[float | None, typer.Option(help="Arrivals, so many times as dense.  [1]")] = None,
    limit: Annotated[int | None, typer.Option(help="Requests, after which nothing more comes.", metavar="COUNT")] = None,
    seed: Annotated[int | None, typer.Option(help="What random numbers begin with: equal seeds, equal results.  [0]")] = None,
    event_lag: Annotated[
        str | None, typer.Option(help="From what an engine does to the event that tells of it.  [0]", metavar="DURATION")
    ] = None,
    event_loss: Annotated[float | None, typer.Option(help="Share of event messages that are lost, 0 to 1.  [0]")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            help="A parameter of the workload or the engines: groups=50, gpu_blocks=9000. Can be repeated.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Try several values, of whatever --set takes, and qps, scale, seed. Can be repeated.", metavar="NAME=V1,V2"
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Runs at once, each a process.  [processors]", metavar="COUNT")
    ] = None,
    json: AsJson = False,
    report: Annotated[
        Path | None, typer.Option(help="Write a page with tables and plots; needs kvatlas[sim].", metavar="FILE.html")
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="Show workloads, policies and presets; with --workload its parameters.")
    ] = False,
) -> None:
    """Compare routing policies on a fleet of simulated engines, on a virtual clock. No GPU is needed, and no engine.

    Engines batch, cache prefixes and evict as vLLM does, at the speed of a measured model (--preset). Policies are asked as in
    production: ours and llm-d's are the router's own code, fed by simulated KV events. What is not modelled is in
    docs/simulator.md.

    With --json each run is an object on a line of its own, and the last line is {"summary": ...}. Ctrl-C shows what is
    finished. Exit status 1: a run could not be done.

    Examples:

        kvatlas simulate
        kvatlas simulate --list
        kvatlas simulate --list -w agents
        kvatlas simulate -w agents --qps 20 -p kvatlas -p llm-d-default -p random
        kvatlas simulate -w trace.jsonl --scale 4 --engines 4 --report report.html
        kvatlas simulate -w shared-prefix -p all --engines 8 --report ladder.html
        kvatlas simulate -w chats --sweep gpu_blocks=10000,20000,40000 --sweep qps=5,10,20 --jobs 8
    """
    quiet_logs()
    if listing:
        from kvatlas.cli.simulate_list import show_list

        show_list(workload)
        return
    given = {
        "engines": engines,
        "qps": qps,
        "scale": scale,
        "limit": limit,
        "seed": seed,
        "event_lag_s": None if event_lag in (None, "0", "0s") else duration("--event-lag", event_lag),
        "event_loss": event_loss,
    }
    values = {name: value for name, value in given.items() if value is not None}
    question = Question(
        policies=_policies(policy or ()),
        workload=workload or WORKLOAD,
        spec=_spec(preset, spec),
        values={**dict(_assigned("--set", text) for text in settings or ()), **values},
        axes=tuple(_axis(text) for text in sweep or ()),
    )
    if report is not None:
        from kvatlas.sim.report import check

        check(report)
    _run(question, jobs or os.cpu_count() or 1, json, report)


def _run(question: Question, jobs: int, as_json: bool, report: Path | None) -> None:
    from kvatlas.cli.simulate_tables import tables

    asked = plans(question)
    found, stopped = _outcomes(asked, jobs)
    found.sort(key=lambda outcome: asked.index(outcome.plan))
    done = [(outcome.plan, outcome.result) for outcome in found if outcome.result is not None]
    problems = [f"{outcome.plan.policy} {outcome.plan.label}: {outcome.problem}" for outcome in found if outcome.result is None]
    if as_json:
        for plan, result in done:
            show_json(_line(plan, result))
        show_json({"summary": {"command": _command(), "runs": len(asked), "finished": len(done), "problems": problems}})
    elif done:
        show_table(lambda width: tables([result for _, result in done], width))
    errors = screen(stderr=True)
    for problem in problems:
        errors.print(f"failed: {problem}", style="bold red", soft_wrap=True)
    if stopped:
        errors.print(f"stopped: {len(done)} of {len(asked)} runs are finished", style="yellow")
    if report is not None and done:
        from kvatlas.sim.report import write

        write(report, done, _command())
        errors.print(f"report: {report}")
    if problems or stopped:
        raise typer.Exit(FAULTS)


def _outcomes(asked: Sequence[Plan], jobs: int) -> tuple[list[Outcome], bool]:
    """Return what came of the runs, and whether Ctrl-C ended them before all were finished."""
    found: list[Outcome] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=len(asked))
        try:
            for outcome in outcomes(asked, jobs):
                found.append(outcome)
                progress.advance(task)
        except KeyboardInterrupt:
            return found, True
    return found, False


def _line(plan: Plan, result: Any) -> dict[str, Any]:
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


# -- what was asked -----------------------------------------------------------------------------------------------------


def _policies(given: Sequence[str]) -> tuple[str, ...]:
    from kvatlas.route.parameters import unknown_name
    from kvatlas.route.picker_config import load_config
    from kvatlas.sim.policies import POLICIES as KNOWN

    if "all" in given:
        return tuple(KNOWN)
    for name in given:
        if Path(name).suffix in (".yaml", ".yml", ".json"):
            load_config(name)
        elif name not in KNOWN:
            raise unknown_name("--policy", "policy", name, ["all", *KNOWN])
    return tuple(dict.fromkeys(given or POLICIES))


def _spec(preset: str | None, file: Path | None) -> EngineSpec:
    from kvatlas.config.layers import parse_yaml
    from kvatlas.route.parameters import read_parameters, unknown_name
    from kvatlas.sim.presets import DEFAULT, PRESETS

    if file is None:
        if preset is not None and preset not in PRESETS:
            raise unknown_name("--preset", "preset", preset, list(PRESETS))
        return PRESETS[preset or DEFAULT].spec
    if preset is not None:
        raise RequestError("--spec", "and --preset are two engines", "give one of both; --set changes single fields")
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("--spec", f"{file} cannot be read: {error}", "name a YAML or JSON file of an engine") from None
    return read_parameters(EngineSpec, parse_yaml(text, str(file)), "")


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
