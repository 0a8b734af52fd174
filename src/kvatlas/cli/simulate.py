"""``kvatlas simulate``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvatlas.cli.options import AsJson, duration
from kvatlas.cli.screen import quiet_logs


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
    preset: Annotated[
        str | None, typer.Option(help="A model on a GPU, from --list.  [qwen3-32b-2xh100]", metavar="NAME")
    ] = None,
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
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="What happens to engines, and when: 60s:slow:2:10 (engine 2 is 10 times slower; 1: as at first), "
            "60s:leave:2, 60s:join. Can be repeated.",
            metavar="TIME:CHANGE",
        ),
    ] = None,
    foreign: Annotated[
        str | None,
        typer.Option(
            help="Requests that reach engines without passing the router: another workload, and the numbers of the engines "
            "it goes to (no-reuse@1,2).  [to all]  Its parameters are set as foreign.qps=4.",
            metavar="NAME|FILE[@ENGINES]",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            help="A parameter of the workload, the run or the engines: groups=50, patience_s=10, gpu_blocks=9000. "
            "Can be repeated.",
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
        kvatlas simulate -w bursts --at 60s:slow:2:10 --at 120s:slow:2:1 --at 180s:join
        kvatlas simulate -w chats --set patience_s=2 --foreign no-reuse@1 --set foreign.qps=4
        kvatlas simulate -w chats --sweep gpu_blocks=10000,20000,40000 --sweep qps=5,10,20 --jobs 8
    """
    from kvatlas.cli.simulate_list import show_list
    from kvatlas.cli.simulate_run import ask, show

    quiet_logs()
    if listing:
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
    question = ask(workload, policy or (), preset, spec, values, settings or (), sweep or (), at or (), foreign)
    show(question, jobs=jobs, as_json=json, report=report)
