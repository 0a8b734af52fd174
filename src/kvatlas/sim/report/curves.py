"""What plots are drawn of: runs in the order of what was varied. No IO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvatlas.sim.results import PhaseResult, RunResult


class Point(NamedTuple):
    """What a curve goes through."""

    at: float
    output_tokens_per_s: float
    ttft_p90_s: float
    hit_ratio: float


class Curves(NamedTuple):
    """A curve for each policy, of what was varied alone."""

    over: str
    """What was varied, for an axis."""
    besides: str
    """What else was set, where several things were varied."""
    by_policy: dict[str, list[Point]]


def curves(runs: Sequence[RunResult]) -> list[Curves]:
    """Return what runs show as one thing grows: the load of their stages, else what was varied first. None: nothing grows."""
    found: dict[tuple[str, str], Curves] = {}
    for run in runs:
        for over, besides, point in _of_phases(run) or _of_label(run):
            one = found.setdefault((over, besides), Curves(over, besides, {}))
            one.by_policy.setdefault(run.policy, []).append(point)
    for one in found.values():
        for points in one.by_policy.values():
            points.sort()
    return [one for one in found.values() if any(len({point.at for point in points}) > 1 for points in one.by_policy.values())]


def _of_phases(run: RunResult) -> list[tuple[str, str, Point]]:
    rates = [(_number(phase.name.removesuffix(" QPS")), phase) for phase in run.phases]
    return [("offered load, requests/s", run.label, _point(at, phase)) for at, phase in rates if at is not None]


def _of_label(run: RunResult) -> list[tuple[str, str, Point]]:
    """Return the run's point over the first thing that was varied and is a number."""
    settings = run.label.split(" ")
    for place, setting in enumerate(settings):
        name, _, value = setting.partition("=")
        at = _number(value)
        if at is not None and name != "seed":
            besides = " ".join(settings[:place] + settings[place + 1 :])
            return [(name, besides, _point(at, run))]
    return []


def _point(at: float, shown: RunResult | PhaseResult) -> Point:
    return Point(at, shown.output_tokens_per_s, shown.ttft.p90, shown.hit_ratio)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
