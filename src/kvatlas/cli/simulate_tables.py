"""What ``kvatlas simulate`` shows of its runs. No IO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from kvatlas.cli.columns import Column, Gives, fitted
from kvatlas.sim.comparison import PHASE_FIGURES, Figure, best, figures, groups, phase_rows
from kvatlas.sim.results import RunResult

GIVING_WAY = (
    *("requests", "preempted", "waiting", "TPOT p99", "queue p90", "imbalance", "gave up", "TTFT p99", "TPOT p50", "TTFT p50"),
    *("varied", "policy", "hit ratio"),
)
"""What a narrow screen does without, the first one first."""
BEST = "*"


def tables(runs: Sequence[RunResult], width: int | None) -> RenderableType:
    """Return tables of runs, of at most ``width`` columns, and what was degraded."""
    parts: list[RenderableType] = [_figures(runs, width)]
    for group in groups(runs):
        parts += _phases(group, width)
    parts += _notes(runs)
    return Group(*parts)


def _figures(runs: Sequence[RunResult], width: int | None) -> RenderableType:
    grouped = groups(runs)
    ordered = [run for group in grouped for run in group]
    columns = [Column("policy", [Text(run.policy) for run in ordered], Gives.SHORTEN)]
    if any(run.label for run in ordered):
        columns.append(Column("varied", [Text(run.label) for run in ordered], Gives.FOLD))
    for figure in figures(runs):
        cells = [cell for group in grouped for cell in _cells(figure, group)]
        columns.append(Column(figure.name, cells, Gives.DROP, right=True))
    title = f"{ordered[0].workload}: {len(ordered[0].engines)} engines, seed {ordered[0].seed}"
    if any(BEST in cell.plain for column in columns for cell in column.cells):
        title += f"; {BEST} is the best of its column" + (" among equals" if len(grouped) > 1 else "")
    return fitted(title, columns, width, GIVING_WAY)


def _cells(figure: Figure, group: Sequence[RunResult]) -> Iterator[Text]:
    leading = best(figure, group)
    for place, run in enumerate(group):
        shown = figure.shown(figure.of(run))
        yield Text(f"{shown}{BEST}", "bold green") if place in leading else Text(f"{shown} ")


def _phases(group: Sequence[RunResult], width: int | None) -> Iterator[RenderableType]:
    for figure in PHASE_FIGURES:
        rows = phase_rows(group, figure)
        if not rows:
            return
        columns = [Column("phase", [Text(name) for name, _ in rows])]
        for place, run in enumerate(group):
            columns.append(Column(run.policy, [Text(shown[place]) for _, shown in rows], Gives.WRAP, right=True))
        title = f"{figure.name} by phase" + (f" ({group[0].label})" if group[0].label else "")
        yield fitted(title, columns, width, [run.policy for run in group])


def _notes(runs: Sequence[RunResult]) -> Iterator[Text]:
    """Yield what was degraded, once each, and in which runs."""
    noted: dict[str, list[str]] = {}
    for run in runs:
        told = [*run.notes, *([f"{run.refused:,} requests were longer than any engine's memory"] if run.refused else [])]
        for note in told:
            noted.setdefault(note, []).append(f"{run.policy} {run.label}".strip())
    for note, who in noted.items():
        yield Text(f"note: {note} ({', '.join(who) if len(who) < len(runs) else 'all runs'})", "yellow")
