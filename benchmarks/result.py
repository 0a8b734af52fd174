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
        baseline = "" if result.baseline is None else f"{result.baseline}: {result.baseline_value:,.4g}"
        ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
        table.add_row(result.scenario, f"{result.value:,.4g}", result.unit, baseline, ratio, result.target or "")
    Console().print(table)
