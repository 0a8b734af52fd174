"""Resident memory per (pod, block) entry: what a process grows by when an index is filled. Each figure in a process of its
own.

Both sides are fed the same blocks, 64 an event; freed memory is given back to the system (``malloc_trim``) before each look
at the resident size, except in Dynamo's service, which is looked at from outside. What an index must keep to serve removals
is in it: the engines' hashes, on both sides. Tables double, so bytes per entry move with the number of entries; it is in the
scenario.
"""

from __future__ import annotations

import msgspec

from benchmarks.result import Result, against
from benchmarks.sides import DYNAMO, Placement, worker
from benchmarks.sides.dynamo_service import service
from benchmarks.sides.process import SideName
from benchmarks.sides.publisher import publisher, stored_frames
from benchmarks.streams import Fleet

NAME = "memory"


def run(*, quick: bool, place: Placement) -> list[Result]:
    entries = 250_000 if quick else 1_000_000
    results = []
    for what, fleet, bytes_max in (
        ("unique blocks", Fleet.of_entries(entries, 8), 48),
        ("the same blocks on 8 pods", Fleet.of_entries(entries, 8, "same"), 12),
    ):
        ours = _in_process(place, "kvatlas", fleet)
        scenario = f"{fleet.entries:,} entries, {what}"
        for baseline, value in (
            (f"{DYNAMO} RadixTree", _in_process(place, "dynamo", fleet)),
            (f"{DYNAMO} service", _service(place, fleet)),
        ):
            result = against(NAME, scenario, ours, "bytes/entry", baseline, value, higher_is_better=False)
            result.target = f"<= {bytes_max} bytes"
            result.met = ours <= bytes_max
            results.append(result)
    return results


def _in_process(place: Placement, side: SideName, fleet: Fleet) -> float:
    with worker(side, place) as process:
        measured = process.ask("memory", fleet=msgspec.to_builtins(fleet))
        grown: int = measured["bytes"]
        entries: int = measured["entries"]
        return grown / entries


def _service(place: Placement, fleet: Fleet) -> float:
    sent = stored_frames(fleet, 64)
    with publisher(fleet.pods, place) as engines, service(place) as running:
        running.register(engines.endpoints)
        engines.wait()
        before = running.resident_bytes()
        engines.publish(sent)
        running.wait_for(sent, fleet.pods)
        return (running.resident_bytes() - before) / fleet.entries
