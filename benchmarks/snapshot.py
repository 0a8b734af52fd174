"""A snapshot of the index: its size, the CPU time to take it, and to restore it into a new index.

Ours: ``NativeIndex.snapshot()`` and ``restore``: bytes that hold everything, engines' hashes included. Dynamo's: the tree's
``dump_tree_as_events`` as JSON lines, and ``apply_event`` of each (only the worker's number is parsed in Python; the event
goes back as the bytes it came as). After restoring, both must find what they found before.
"""

from __future__ import annotations

import msgspec

from benchmarks.result import Result, against, median
from benchmarks.sides import DYNAMO, Placement, both
from benchmarks.streams import Fleet

NAME = "snapshot"


def run(*, quick: bool, place: Placement) -> list[Result]:
    fleet = Fleet.of_entries(200_000 if quick else 1_000_000, 8)
    taken: dict[str, list[dict[str, float]]] = {"kvatlas": [], "dynamo": []}
    with both(place) as (ours, theirs):
        for _ in range(1 if quick else 3):
            for side in (ours, theirs):
                taken[side.side].append(side.ask("snapshots", fleet=msgspec.to_builtins(fleet)))
    results = []
    for figure, theirs_figure, what, scale, unit, reach in (
        ("bytes", "bytes", "size", 1e-6, "MB", 4.0),
        ("snapshot_s", "snapshot_s", "taking it", 1.0, "CPU s", 10.0),
        ("restore_s", "restore_s", "restoring it", 1.0, "CPU s", 10.0),
        ("restore_s", "restore_parsed_s", "restoring it", 1.0, "CPU s", 10.0),
    ):
        results.append(
            against(
                NAME,
                f"{fleet.entries:,} entries, {fleet.pods} pods: {what}",
                median([one[figure] for one in taken["kvatlas"]]) * scale,
                unit,
                f"{DYNAMO} RadixTree, JSON" + (" parsed by Python's json" if theirs_figure == "restore_parsed_s" else ""),
                median([one[theirs_figure] for one in taken["dynamo"]]) * scale,
                higher_is_better=False,
                reach=reach,
            )
        )
    return results
