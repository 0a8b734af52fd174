"""Queries while another thread writes at full speed: p99 of finding 512 keys, beside the same with no writer.

One thread asks without pause (ours with its keys in a buffer, Dynamo with a list, the fastest form of each); in every other
turn a second thread of the process stores and removes blocks of 8 other pods in payloads of 64 blocks, 32 payloads a call,
on another core where there is one. The baseline is the same index with nobody writing. The last row sets it beside Dynamo's
tree under the same load: its queries wait behind events in the tree's one thread. Wall time, microseconds.
"""

from __future__ import annotations

import msgspec

from benchmarks import queries
from benchmarks.result import Result, against, median
from benchmarks.sides import DYNAMO, Placement, worker
from benchmarks.sides.process import SideName

NAME = "readers"
_KEYS = 512


def run(*, quick: bool, place: Placement) -> list[Result]:
    measured = {side: _measure(place, side, quick=quick) for side in ("kvatlas", "dynamo")}
    ours, theirs = measured["kvatlas"], measured["dynamo"]
    where = "a core each" if place.feeding not in place.measured else "one core"
    results = []
    for percent, reach in ((50, None), (99, 1 / 3)):
        idle, busy = (queries.percentiles(ours[f"{when}_us"])[percent] for when in ("idle", "busy"))
        rate = median(ours["blocks_per_s"]) / 1e6
        scenario = f"{_KEYS} keys while {rate:.2f} Mblocks/s are written, {where}, p{percent}"
        results.append(against(NAME, scenario, busy, "us", "kvatlas idle", idle, higher_is_better=False, reach=reach))
        rate = median(theirs["blocks_per_s"]) / 1e6
        baseline = f"{DYNAMO} RadixTree at {rate:.2f} Mblocks/s"
        under_load = queries.percentiles(theirs["busy_us"])[percent]
        results.append(against(NAME, scenario, busy, "us", baseline, under_load, higher_is_better=False))
    return results


def _measure(place: Placement, side: SideName, *, quick: bool) -> dict[str, list[float]]:
    """The reader keeps the worker's core; the writer goes to the other one. Dynamo's tree thread runs beside its reader."""
    fleet = queries.fleet_of(200_000 if quick else 1_000_000, 8)
    with worker(side, place) as process:
        process.ask("load", fleet=msgspec.to_builtins(fleet))
        measured: dict[str, list[float]] = process.ask(
            "readers",
            prompts=fleet.prompts(queries.PROMPTS),
            blocks=_KEYS,
            seconds=1.0 if quick else 2.0,
            rounds=3 if quick else 5,
            writer_core=place.feeding,
        )
        return measured
