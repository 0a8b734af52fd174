"""Draws the curves of ``scaling``: a column for what grows, a row for what it costs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.result import commit, machine
from benchmarks.sides import DYNAMO, BaselineError

if TYPE_CHECKING:
    from benchmarks.scaling import Point

_AXES = ("entries", "pods", "threads")
_LABELS = {"kvatlas": "kvatlas (native)", "dynamo": f"{DYNAMO} (RadixTree)"}
_STYLES = {"kvatlas": ("#1f6feb", "o"), "dynamo": ("#7a7a7a", "s")}


def check() -> None:
    """Raise before an hour is spent measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BaselineError("--plot needs matplotlib: pip install 'kvatlas[bench]'")


def draw(points: list[Point], path: Path) -> None:
    """Write the plot. The suffix says which format."""
    import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    mpl.rcParams["svg.hashsalt"] = "kvatlas"  # the same data gives the same file
    rows = sorted({(name, figure[1]) for point in points for name, figure in point.figures.items()})
    panels = {axis: [row for row in rows if _has(points, axis, row)] for axis in _AXES}
    height = max(len(panel) for panel in panels.values())
    figure = Figure(figsize=(4.2 * len(_AXES), 2.6 * height), layout="constrained")
    grid = figure.subplots(height, len(_AXES), squeeze=False)
    for column, axis in enumerate(_AXES):
        for row in range(height):
            panel = grid[row][column]
            if row >= len(panels[axis]):
                panel.set_axis_off()
                continue
            name, unit = panels[axis][row]
            for side, label in _LABELS.items():
                curve = sorted(
                    (point.at, point.figures[name][0]) for point in points if point.axis == axis and point.side == side
                )
                color, marker = _STYLES[side]
                panel.plot(*zip(*curve, strict=True), color=color, marker=marker, label=label)
            panel.set_xscale("log", base=2 if axis == "threads" else 10)
            panel.set_yscale("log")
            ticks = sorted({point.at for point in points if point.axis == axis})
            panel.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
            panel.minorticks_off()
            panel.set_title(f"{name}, {unit}", fontsize=9)
            panel.set_xlabel(axis)
            panel.grid(visible=True, alpha=0.3)
    grid[0][0].legend(fontsize=8)
    figure.suptitle(f"{machine()}; commit {commit()}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _has(points: list[Point], axis: str, row: tuple[str, str]) -> bool:
    name, unit = row
    return any(point.axis == axis and name in point.figures and point.figures[name][1] == unit for point in points)
