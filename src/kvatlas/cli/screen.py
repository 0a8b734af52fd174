"""What commands show: tables and panels for people on standard output, JSON lines for programs, errors on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Literal

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from kvatlas.config import LogSettings
from kvatlas.errors import KvatlasError

PIPED_WIDTH = 160
"""Columns of a table that goes to a file or another program."""

UNBOUNDED = 10_000


def screen(*, stderr: bool = False) -> Console:
    """Return a console. Text is shown as it is: what comes from engines and files is never taken for markup."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def table(title: str, *columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """Return an empty table. Columns in ``right`` hold numbers; those in ``whole`` stay whole on a narrow screen."""
    made = Table(title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify: Literal["right", "left"] = "right" if column in right else "left"
        made.add_column(Text(column), justify=justify, overflow="fold", no_wrap=column in whole)
    return made


def show_table(made: Callable[[int | None], RenderableType]) -> None:
    """Print what ``made`` returns for the screen's width; for None, any width, where it goes to a file or another program."""
    console = screen()
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        console.print(made(console.width))
        return
    shown = made(None)
    console.width = max(console.width, console.measure(shown, options=console.options.update(width=UNBOUNDED)).maximum)
    console.print(shown)


def show_json(value: object) -> None:
    """Write one JSON object on a line of its own, at once: a program may be reading."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def show_error(error: KvatlasError) -> None:
    """Say what is wrong and what to do."""
    screen(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)


def quiet_logs() -> None:
    """Send warnings and errors of the library to standard error, in a form for people."""
    from kvatlas.observe.logs import configure_logs

    configure_logs(LogSettings(level="warning", format="console"))
