"""One measured figure, and what is needed to compare it: scenario, machine, commit, baseline."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence

import msgspec


class Result(msgspec.Struct):
    """``ratio`` is ours over the baseline's, so that more than 1 is better. Without a baseline the figure is one for others."""

    name: str
    scenario: str
    value: float
    unit: str
    higher_is_better: bool
    baseline: str | None = None
    baseline_value: float | None = None
    ratio: float | None = None
    target: str | None = None
    met: bool | None = None


def against(
    name: str,
    scenario: str,
    value: float,
    unit: str,
    baseline: str,
    baseline_value: float,
    *,
    higher_is_better: bool,
    reach: float | None = None,
) -> Result:
    """Return a figure beside its baseline's. ``reach``: the ratio aimed at."""
    ratio = value / baseline_value if higher_is_better else baseline_value / value
    target = None if reach is None else f">= {reach:.3g}x"
    met = None if reach is None else ratio >= reach
    return Result(name, scenario, value, unit, higher_is_better, baseline, baseline_value, ratio, target, met)


def machine() -> str:
    """Return what it ran on, in one line."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the architecture has to do
    return f"{model}, {len(os.sched_getaffinity(0))} cores, CPython {platform.python_version()}"


def commit() -> str:
    """Return the commit, with a mark if the tree differs from it."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    described = subprocess.run([git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def median(values: Sequence[float]) -> float:
    return percentile(values, 0.5)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def show(results: Sequence[Result], *, as_json: bool) -> None:
    """Print results: one JSON object a line, or a table."""
    if as_json:
        for result in results:
            sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{machine()}; commit {commit()}")
    for column in ("scenario", "value", "unit", "baseline", "ratio", "target"):
        table.add_column(column, justify="right" if column in ("value", "ratio") else "left")
    for result in results:
        baseline = "" if result.baseline is None else f"{result.baseline}: {_rounded(result.baseline_value or 0.0)}"
        ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
        target = "" if result.target is None else f"{result.target} {'reached' if result.met else 'not reached'}"
        table.add_row(result.scenario, _rounded(result.value), result.unit, baseline, ratio, target)
    console = Console()
    if not console.is_terminal:
        console.width = 180
    console.print(table)


def _rounded(value: float) -> str:
    """Four digits that mean something, without exponents."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
