"""Runs beside each other: which figures are shown of them, how, and who has the best. No IO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvatlas.config.quantities import round_duration
from kvatlas.sim.results import PhaseResult, RunResult
from kvatlas.sim.workloads.shared_prefix import WARM_UP


class Figure(NamedTuple):
    """One figure of a run."""

    name: str
    what: str
    of: Callable[[RunResult], float]
    shown: Callable[[float], str]
    more_is_better: bool | None
    """None: neither is."""


def thousands(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value else "0"


def count(value: float) -> str:
    return f"{value:,.0f}"


def share(value: float) -> str:
    return f"{value:.1%}"


def ratio(value: float) -> str:
    return f"{value:.2f}"


def waiting(result: RunResult) -> float:
    """Return the requests in all queues, over time."""
    return sum(engine.waiting_mean for engine in result.engines)


def throughput(result: RunResult) -> float:
    """Return output tokens a second; of a workload with phases the mean of these, but for a warm-up: between them it idles."""
    phases = [phase for phase in result.phases if phase.name != WARM_UP] or result.phases
    if not phases:
        return result.output_tokens_per_s
    return sum(phase.output_tokens_per_s for phase in phases) / len(phases)


GAVE_UP = "gave up"
FIGURES = (
    Figure("output tok/s", "tokens answered a second; with phases: the mean of theirs", throughput, thousands, True),
    Figure("TTFT p50", "time to first token, of half of the requests", lambda run: run.ttft.p50, round_duration, False),
    Figure("TTFT p90", "of nine tenths of them", lambda run: run.ttft.p90, round_duration, False),
    Figure("TTFT p99", "of 99 in 100", lambda run: run.ttft.p99, round_duration, False),
    Figure("TPOT p50", "time for each further token", lambda run: run.tpot.p50, round_duration, False),
    Figure("TPOT p99", "of 99 in 100", lambda run: run.tpot.p99, round_duration, False),
    Figure("hit ratio", "prompt tokens that were not computed", lambda run: run.hit_ratio, share, True),
    Figure("imbalance", "tokens computed: busiest engine over the mean", lambda run: run.imbalance, ratio, False),
    Figure("queue p90", "from arrival to the first step", lambda run: run.queue.p90, round_duration, False),
    Figure("waiting", "requests in all queues, over time", waiting, thousands, False),
    Figure("preempted", "how often a request had to begin again", lambda run: run.preemptions, count, False),
    Figure(GAVE_UP, "requests whose clients went before the first token", lambda run: run.gave_up, count, False),
    Figure("requests", "answered", lambda run: run.finished, count, None),
)


def figures(runs: Sequence[RunResult]) -> list[Figure]:
    """Return the figures to be shown of runs: of clients who gave up only where somebody did."""
    return [figure for figure in FIGURES if figure.name != GAVE_UP or any(run.gave_up for run in runs)]


def best(figure: Figure, runs: Sequence[RunResult]) -> frozenset[int]:
    """Return who has the best value, by place: all that show as the same; nobody where all do, or where one is alone."""
    values = [figure.of(run) for run in runs]
    if figure.more_is_better is None or len(values) < 2:
        return frozenset()
    wanted = figure.shown(max(values) if figure.more_is_better else min(values))
    found = frozenset(place for place, value in enumerate(values) if figure.shown(value) == wanted)
    return found if len(found) < len(values) else frozenset()


def groups(runs: Sequence[RunResult]) -> list[list[RunResult]]:
    """Return runs that differ in nothing but their policy together, in their order."""
    found: dict[tuple[str, str], list[RunResult]] = {}
    for run in runs:
        found.setdefault((run.workload, run.label), []).append(run)
    return list(found.values())


class PhaseFigure(NamedTuple):
    """One figure of a workload's part."""

    name: str
    of: Callable[[PhaseResult], float]
    shown: Callable[[float], str]


PHASE_FIGURES = (
    PhaseFigure("output tokens/s", lambda phase: phase.output_tokens_per_s, thousands),
    PhaseFigure("TTFT p90", lambda phase: phase.ttft.p90, round_duration),
    PhaseFigure("hit ratio", lambda phase: phase.hit_ratio, share),
)


def phase_rows(runs: Sequence[RunResult], figure: PhaseFigure) -> list[tuple[str, list[str]]]:
    """Return a row for each phase: its name, and the figure of each run; empty where a run has no such phase."""
    names = {phase.name: None for run in runs for phase in run.phases}  # a set that keeps its order
    found = [{phase.name: figure.shown(figure.of(phase)) for phase in run.phases} for run in runs]
    return [(name, [phases.get(name, "") for phases in found]) for name in names]
