"""Blocks out of the index: event by event in blocks per CPU second, and a whole pod in milliseconds.

Event by event both sides hold blocks of 8 pods and remove all, every chain from its end. *64 hashes an event*: the same
number of hashes an event and one event a payload on both sides, in process; Dynamo's JSON is made before the clock starts.
*1 hash an event*, which is what vLLM sends: ours gets 64 events a payload, as an engine step brings them; Dynamo's
in-process tree takes one JSON event a call. *frames*: the same payloads as ZMQ frames, read by both sides, Dynamo's being
its service (see ``ingest``).

A whole pod: ``NativeIndex.forget`` beside ``RadixTree.remove_worker``, from the call until a query no longer sees the pod.
Ours leaves records that nobody holds to be freed later, by writers or ``expire``, once a quarter are of that kind; so the
second figure removes all 8 pods one after the other, each followed by ``expire``, until the memory of all is free, and is
the mean of a pod. Dynamo leaves nothing that a call could ask for. Wall time.
"""

from __future__ import annotations

import msgspec

from benchmarks.result import Result, against, median
from benchmarks.sides import DYNAMO, Placement, Worker, both
from benchmarks.sides.frames import ours_cpu_s, service_cpu_s
from benchmarks.sides.publisher import removed_frames, stored_frames
from benchmarks.streams import CHAIN_BLOCKS, Fleet

NAME = "removal"
_BASELINE = f"{DYNAMO} RadixTree"


def run(*, quick: bool, place: Placement) -> list[Result]:
    fleet = Fleet.of_entries(200_000 if quick else 1_000_000, 8)
    rounds = 2 if quick else 3
    with both(place) as (ours, theirs):
        results = [
            _events(ours, theirs, fleet, "64 hashes an event", 64, 1, rounds),
            _events(ours, theirs, fleet, "1 hash an event", 1, 64, rounds),
            _frames(place, ours, fleet, rounds),
        ]
        results += _pod(ours, theirs, Fleet(chains=8 * 131_072 // CHAIN_BLOCKS, pods=8), 2 if quick else 6)
    return results


def _events(ours: Worker, theirs: Worker, fleet: Fleet, what: str, hashes: int, events: int, rounds: int) -> Result:
    rates: dict[str, list[float]] = {"kvatlas": [], "dynamo": []}
    for _ in range(rounds):
        for side in (ours, theirs):
            took = side.ask("removal", fleet=msgspec.to_builtins(fleet), hashes_per_event=hashes, events_per_payload=events)
            rates[side.side].append(took["blocks"] / took["cpu_s"])
    return against(
        NAME,
        f"{fleet.entries:,} blocks, {fleet.pods} pods, {what}",
        median(rates["kvatlas"]),
        "blocks/CPU s",
        f"{_BASELINE}, JSON",
        median(rates["dynamo"]),
        higher_is_better=True,
        reach=1.5,
    )


def _frames(place: Placement, ours: Worker, fleet: Fleet, rounds: int) -> Result:
    parts = [stored_frames(fleet, 64), removed_frames(fleet)]
    ours_rates, service_rates = [], []
    for _ in range(rounds):
        service_rates.append(fleet.entries / service_cpu_s(place, fleet.pods, parts)[1])
        ours_rates.append(fleet.entries / ours_cpu_s(place, ours, fleet.pods, parts)[1])
    return against(
        NAME,
        f"frames: {fleet.entries:,} blocks, {fleet.pods} pods, 1 hash an event, 64 events a frame",
        median(ours_rates),
        "blocks/CPU s",
        f"{DYNAMO} service",
        median(service_rates),
        higher_is_better=True,
        reach=1.5,
    )


def _pod(ours: Worker, theirs: Worker, fleet: Fleet, rounds: int) -> list[Result]:
    given = msgspec.to_builtins(fleet)
    visible_ms: dict[str, list[float]] = {"kvatlas": [], "dynamo": []}
    all_ms: dict[str, list[float]] = {"kvatlas": [], "dynamo": []}
    for side in (ours, theirs):
        side.ask("load", fleet=given)
    for _ in range(rounds):
        for side in (ours, theirs):
            visible_ms[side.side] += side.ask("remove_pod", fleet=given, rounds=5)
    for _ in range(1 + rounds // 3):
        for side in (ours, theirs):
            all_ms[side.side].append(side.ask("remove_pods", fleet=given))
    held = fleet.entries // fleet.pods
    return [
        against(
            NAME,
            f"a pod with {held:,} of {fleet.entries:,} entries, {what}",
            median(taken["kvatlas"]),
            "ms",
            _BASELINE,
            median(taken["dynamo"]),
            higher_is_better=False,
            reach=1.0,
        )
        for what, taken in (("until no query sees it", visible_ms), ("with clean-up, mean of all pods in turn", all_ms))
    ]
