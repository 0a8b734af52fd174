"""What ``find`` and ``score`` share: the fleets they ask, the turns they take, and that both sides say the same."""

from __future__ import annotations

from typing import Any

import msgspec

from benchmarks.result import percentile
from benchmarks.sides import Worker, WorkerError
from benchmarks.streams import CHAIN_BLOCKS, Fleet

PROMPTS = 16
"""Prompts asked in turn, so that one query's blocks are not what the last one left in the processor's cache."""


def load(ours: Worker, theirs: Worker, fleet: Fleet) -> list[int]:
    """Fill both sides, check that they answer the same, and return the prompts to ask for."""
    given = msgspec.to_builtins(fleet)
    for side in (ours, theirs):
        side.ask("load", fleet=given)
    prompts = fleet.prompts(PROMPTS)
    said = [side.ask("answers", prompts=prompts[:4], blocks=CHAIN_BLOCKS) for side in (ours, theirs)]
    if said[0] != said[1]:
        raise WorkerError("the sides answer the same query differently")
    return prompts


def fleet_of(entries: int, pods: int) -> Fleet:
    """Return a fleet where every pod holds every prompt to a depth of its own: the longest walk, and all pods in the answer."""
    return Fleet.of_entries(entries, pods, "depths")


def interleaved(asks: dict[str, tuple[Worker, str, dict[str, Any]]], turns: int) -> dict[str, list[float]]:
    """Ask each in turn, several times; return all samples by name."""
    samples: dict[str, list[float]] = {name: [] for name in asks}
    for _ in range(turns):
        for name, (side, what, given) in asks.items():
            samples[name] += side.ask(what, **given)
    return samples


def percentiles(samples: list[float]) -> dict[int, float]:
    return {percent: percentile(samples, percent / 100) for percent in (50, 99)}
