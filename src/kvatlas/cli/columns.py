"""Tables that fit their screen: what matters stays, the rest gives way in an order that the caller sets. No IO."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

SHORTENED_MIN = 16
"""Columns that a shortened cell keeps at least."""

_BETWEEN = 3
_EDGES = 2


class Gives(enum.Enum):
    """How a column gives way on a narrow screen."""

    NEVER = "never"
    DROP = "drop"
    FOLD = "fold"
    """Goes below the first column's cell."""
    WRAP = "wrap"
    """Breaks between words."""
    SHORTEN = "shorten"
    """Loses the middle of its cells: a pod's name tells its deployment in front and itself at the end."""


@dataclass(slots=True)
class Column:
    """One column: its heading, its cells, and how it gives way."""

    name: str
    cells: list[Text] = field(default_factory=list)
    gives: Gives = Gives.NEVER
    right: bool = False
    fixed_width: int | None = None
    wrapped: bool = False

    @property
    def width(self) -> int:
        """Columns that it takes as it is now."""
        if self.fixed_width is not None:
            return self.fixed_width
        lines = [self.name, *(line for cell in self.cells for line in cell.plain.split("\n"))]
        if self.wrapped:
            lines = [word for line in lines for word in line.split()]
        return max(map(cell_len, lines), default=0)


def fitted(title: str, columns: Sequence[Column], width: int | None, order: Sequence[str]) -> Table:
    """Return a table of at most ``width`` columns. ``width`` None: as wide as it must be to show all.

    ``order`` names the columns in the order in which they give way; each does so once, and none without need. Columns that
    hold nothing go before any other.
    """
    kept = list(columns)
    if width is not None and _total(kept) > width:
        kept = [column for column in kept if any(cell.plain for cell in column.cells)]
        for name in order:
            if _total(kept) <= width:
                break
            kept = _give_way(kept, name, width)
        _spread(kept, width)
    return _made(title, kept)


def shortened(text: str, width: int) -> str:
    """Return the text, without its middle where it is longer than ``width``."""
    if cell_len(text) <= width:
        return text
    head = max(width - 1, 0) // 2
    tail = max(width - 1, 0) - head
    return f"{text[:head]}…{text[len(text) - tail :]}"


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + _BETWEEN * (len(columns) - 1) + _EDGES


def _give_way(columns: list[Column], name: str, width: int) -> list[Column]:
    column = next((one for one in columns if one.name == name), None)
    if column is None:
        return columns
    match column.gives:
        case Gives.DROP:
            return [one for one in columns if one is not column]
        case Gives.FOLD:
            first, *others = (one for one in columns if one is not column)
            for cell, below in zip(first.cells, column.cells, strict=True):
                cell.append("\n  ").append(below.plain, "dim")
            return [first, *others]
        case Gives.WRAP:
            column.wrapped = True
        case Gives.SHORTEN:
            column.fixed_width = max(column.width - (_total(columns) - width), min(column.width, SHORTENED_MIN))
            column.cells = [_each_line_shortened(cell, column.fixed_width) for cell in column.cells]
        case Gives.NEVER:
            pass
    return columns


def _each_line_shortened(cell: Text, width: int) -> Text:
    lines = [Text(shortened(line.plain, width)) for line in cell.split("\n")]
    for line in lines[1:]:
        line.stylize("dim")
    return Text("\n").join(lines)


def _spread(columns: Sequence[Column], width: int) -> None:
    """Give what is left to wrapped columns, so that they break no more than they must."""
    for column in columns:
        if column.wrapped:
            widened = column.width + width - _total(columns)
            column.wrapped = False
            column.fixed_width = min(column.width, widened)


def _made(title: str, columns: Sequence[Column]) -> Table:
    made = Table(title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(
            Text(column.name),
            justify="right" if column.right else "left",
            overflow="fold",
            width=column.fixed_width,
            no_wrap=column.fixed_width is None,
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        made.add_row(*row)
    return made
