"""What scores were made of, as a table: whatever a scorer tells of them, by names that end with their unit. No IO."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from kvatlas.cli.columns import Column, Gives, fitted
from kvatlas.config.quantities import round_duration
from kvatlas.serve.routing.explain import CandidateShown, ProfileShown

KEPT = 4
"""Parts that stay longer than the endpoint's whole name on a narrow screen; scorers tell the most important ones first."""

_NOTHING = (0, "no")


def part_tables(profile: ProfileShown, width: int | None) -> Iterator[RenderableType]:
    """Yield a table for each scorer that tells what its scores were made of. Parts that are nothing everywhere are left out."""
    rows = profile.candidates
    for scorer in rows[0].scores if rows else ():
        told = {name: None for row in rows for name in row.scores[scorer].parts}  # a set that keeps its order
        names = [name for name in told if any(_part(row, scorer, name) not in _NOTHING for row in rows)]
        if not names:
            continue
        columns = [Column("endpoint", [endpoint_of(row) for row in rows], Gives.SHORTEN)]
        for name in names:
            cells = [_cell(name, _part(row, scorer, name)) for row in rows]
            columns.append(Column(_heading(name), cells, Gives.DROP, right=True))
        headings = [column.name for column in columns[1:]]
        order = [*reversed(headings[KEPT:]), "endpoint", *reversed(headings[1:KEPT])]
        yield fitted(f"What {scorer} went by", columns, width, order)


def endpoint_of(row: CandidateShown) -> Text:
    """Return a candidate's name, marked where it was picked."""
    return Text(f"> {row.endpoint}", "green") if row.picked else Text(f"  {row.endpoint}")


def _part(row: CandidateShown, scorer: str, name: str) -> float | str:
    return row.scores[scorer].parts.get(name, 0)


def _heading(name: str) -> str:
    name = name.removesuffix("_per_s") + "/s" if name.endswith("_per_s") else name.removesuffix("_s")
    return name.removesuffix("_tokens").replace("_", " ")


def _cell(name: str, value: float | str) -> Text:
    if isinstance(value, str):
        return Text(value)
    if name.endswith("_s") and not name.endswith("_per_s"):
        return Text(round_duration(value))
    whole = abs(value) >= 100 or value == int(value)
    return Text(f"{value:.0f}" if whole else f"{value:.2f}")
