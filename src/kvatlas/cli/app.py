"""``kvatlas``: all commands, and how failures are told."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from kvatlas.cli import (
    calibrate,
    demo,
    doctor,
    engine,
    explain,
    pods,
    record,
    replay,
    route,
    score,
    serve,
    simulate,
    tokenizer,
)
from kvatlas.cli.screen import show_error
from kvatlas.errors import KvatlasError

FAILED = 2
"""Exit status of a command that could not do its work; 1 is that of one that did, and found something wrong."""

app = typer.Typer(
    name="kvatlas",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # they would print local variables: prompts among them
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    serve.serve,
    route.route,
    explain.explain,
    score.score,
    pods.pods,
    record.record,
    replay.replay,
    simulate.simulate,
    doctor.doctor,
    tokenizer.tokenizer,
    engine.engine,
    demo.demo,
    calibrate.calibrate,
):
    app.command(no_args_is_help=command in (record.record, replay.replay, score.score, calibrate.calibrate))(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvatlas {version('kvatlas')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A live map of which KV-cache blocks sit on which LLM engine, and who holds the longest prefix of a prompt.

    Start with `kvatlas serve` or `kvatlas route`, or look at a recording with `kvatlas replay`.
    """


def main() -> None:
    """Run a command; exit status 0, 1 (done, and something is wrong), 2 (could not be done)."""
    try:
        app()
    except KvatlasError as error:
        show_error(error)
        sys.exit(FAILED)
