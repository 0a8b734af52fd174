"""What storing, asking and memory cost as the work grows: entries, pods, threads. ``--plot FILE`` draws the curves.

- *entries*: blocks of their own on 8 pods. *pods*: 1M entries, every pod holds every prompt to a depth of its own, so that a
  longer list of pods is in every answer. Both on one core (``--cores``); stored in blocks per CPU second, 64 blocks an
  event; queries in wall time, p50.
- *threads*: on all cores; threads of one process ask without pause, then store 16k blocks each; both per wall second, all
  threads together. Python threads share the GIL: what a call does without it is what can scale.

Dynamo's side is its in-process ``RadixTree`` with JSON events; its keys and scores are those of ``find`` and ``score``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks import queries
from benchmarks.result import Result, against, percentile
from benchmarks.sides import DYNAMO, Placement, Worker, worker
from benchmarks.sides.process import SideName
from benchmarks.streams import Fleet

NAME = "scaling"
_SIDES: tuple[SideName, SideName] = ("kvatlas", "dynamo")
_BYTES_PER_ENTRY_MAX = 400
"""With Python's own share and what is being prepared: no run is begun that might not fit."""

Figures = dict[str, tuple[float, str, bool]]
"""What was measured at one point: value, unit, higher is better."""


class Point(msgspec.Struct, frozen=True):
    """One place on a curve."""

    axis: str
    at: int
    side: SideName
    figures: Figures


def run(*, quick: bool, place: Placement, plot: Path | None = None) -> list[Result]:
    if plot is not None:
        from benchmarks.scaling_plot import check

        check()
    points = list(_measure(place, quick=quick))
    if plot is not None:
        from benchmarks.scaling_plot import draw

        draw(points, plot)
    return list(_results(points))


def _measure(place: Placement, *, quick: bool) -> Iterator[Point]:
    for entries in (50_000, 200_000) if quick else (100_000, 1_000_000, 10_000_000):
        if entries * _BYTES_PER_ENTRY_MAX > _memory_available_bytes():
            print(f"scaling: {entries:,} entries left out: not enough memory", file=sys.stderr)
            continue
        for side in _SIDES:
            yield Point("entries", entries, side, _one(place, side, Fleet.of_entries(entries, 8), quick=quick))
    for pods in (8, 64) if quick else (8, 64, 256, 1_024):
        fleet = queries.fleet_of(100_000 if quick else 1_000_000, pods)
        for side in _SIDES:
            yield Point("pods", pods, side, _one(place, side, fleet, quick=quick))
    fleet = queries.fleet_of(100_000 if quick else 1_000_000, 8)
    everywhere = Placement(tuple(sorted(os.sched_getaffinity(0))), place.feeding)
    for side in _SIDES:
        with worker(side, everywhere) as process:
            process.ask("load", fleet=msgspec.to_builtins(fleet))
            for threads in (1, 2) if quick else (1, 2, 4, 8):
                yield Point("threads", threads, side, _threads(process, fleet, threads, quick=quick))


def _one(place: Placement, side: SideName, fleet: Fleet, *, quick: bool) -> Figures:
    """Fill a new process with a fleet and ask it."""
    with worker(side, place) as process:
        grown = process.ask("grow", fleet=msgspec.to_builtins(fleet), blocks_per_event=64)
        rounds = 100 if quick else 500
        prompts = fleet.prompts(queries.PROMPTS)
        find_us = process.ask("find_us", prompts=prompts, blocks=512, rounds=rounds, buffer=True)
        score_us = process.ask("score_us", prompts=prompts, rounds=rounds, buffer=True)
    return {
        "stored": (grown["blocks"] / grown["cpu_s"], "blocks/CPU s", True),
        "find 512 keys": (percentile(find_us, 0.5), "us", False),
        "score 32,768 tokens": (percentile(score_us, 0.5), "us", False),
        "memory": (grown["bytes"] / grown["blocks"], "bytes/entry", False),
    }


def _threads(process: Worker, fleet: Fleet, threads: int, *, quick: bool) -> Figures:
    prompts = fleet.prompts(queries.PROMPTS)
    measured = process.ask("threads", prompts=prompts, count=threads, seconds=1.0 if quick else 3.0)
    return {
        "find 512 keys": (measured["finds_per_s"], "queries/s", True),
        "stored": (measured["blocks_per_s"], "blocks/s", True),
    }


def _results(points: list[Point]) -> Iterator[Result]:
    theirs = {(point.axis, point.at): point.figures for point in points if point.side == "dynamo"}
    for point in points:
        if point.side == "dynamo":
            continue
        for figure, (value, unit, higher) in point.figures.items():
            baseline, _, _ = theirs[point.axis, point.at][figure]
            scenario = f"{point.at:,} {point.axis}: {figure}"
            yield against(NAME, scenario, value, unit, f"{DYNAMO} RadixTree", baseline, higher_is_better=higher)


def _memory_available_bytes() -> int:
    with open("/proc/meminfo", encoding="utf-8") as lines:
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return int(kilobytes) * 1024
