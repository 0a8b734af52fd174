"""Engines' events into the index, in blocks per CPU second (all threads of the process that holds the index).

What is compared with what:

- *frames*: both sides read vLLM's msgpack frames from ZMQ sockets on loopback, published by a third process. Dynamo's side
  is its standalone service (``python -m dynamo.indexer --threads 1``), the only part of it that reads frames; ours is a loop
  that takes what waits and calls ``NativeIndex.apply_payloads`` by pod. Receiving is in both figures.
- *decoded and applied*: ours without the socket: the same payloads, in memory. Dynamo has no such call; beside it stands the
  service's figure again, which includes receiving.
- *in process*: ours as before, beside ``RadixTree.apply_event``, which takes JSON with the blocks' token hashes computed
  already (hashing and decoding of msgpack are not in Dynamo's figure; parsing JSON is).

Every pod holds blocks of its own (chains of 2,048); pods send in turns of up to 32 payloads. An event is a payload. The
measured process has one core unless ``--cores`` says otherwise, which suits Dynamo: each event of its in-process tree is
handed to another thread, and waking one on a sleeping core costs several times more.
"""

from __future__ import annotations

import msgspec

from benchmarks.result import Result, against, median
from benchmarks.sides import DYNAMO, Placement, Worker, both, worker
from benchmarks.sides.frames import ours_cpu_s, service_cpu_s
from benchmarks.sides.publisher import stored_frames
from benchmarks.streams import Fleet

NAME = "ingest"
_UNIT = "blocks/CPU s"


def run(*, quick: bool, place: Placement) -> list[Result]:
    blocks = 200_000 if quick else 1_000_000
    rounds = 2 if quick else 3
    results = []
    for pods in (8, 64) if quick else (8, 64, 256):
        results += _frames(place, Fleet.of_entries(blocks, pods), 64, rounds, reach=4.0)
    results += _frames(place, Fleet.of_entries(100_000 if quick else 200_000, 8), 1, rounds, reach=None)
    with both(place) as (ours, theirs):
        for pods in (8,) if quick else (8, 64, 256):
            results += _in_process(ours, theirs, Fleet.of_entries(blocks, pods), 64, rounds, reach=None)
        results += _in_process(ours, theirs, Fleet.of_entries(100_000 if quick else 1_000_000, 8), 1, rounds, reach=10.0)
    return results


def _what(fleet: Fleet, blocks_per_event: int) -> str:
    return f"{fleet.entries:,} blocks, {fleet.pods} pods, {blocks_per_event} block{'s'[: blocks_per_event > 1]} an event"


def _frames(place: Placement, fleet: Fleet, blocks_per_event: int, rounds: int, *, reach: float | None) -> list[Result]:
    sent = stored_frames(fleet, blocks_per_event)
    ours_rates, memory_rates, service_rates = [], [], []
    with worker("kvatlas", place) as ours:
        for _ in range(rounds):
            service_rates.append(fleet.entries / service_cpu_s(place, fleet.pods, [sent])[0])
            ours_rates.append(fleet.entries / ours_cpu_s(place, ours, fleet.pods, [sent])[0])
            took = ours.ask("ingest", fleet=msgspec.to_builtins(fleet), blocks_per_event=blocks_per_event)
            memory_rates.append(took["blocks"] / took["cpu_s"])
    baseline = f"{DYNAMO} service"
    theirs = median(service_rates)
    what = _what(fleet, blocks_per_event)
    return [
        against(NAME, f"frames: {what}", median(ours_rates), _UNIT, baseline, theirs, higher_is_better=True, reach=reach),
        against(NAME, f"decoded and applied: {what}", median(memory_rates), _UNIT, baseline, theirs, higher_is_better=True),
    ]


def _in_process(
    ours: Worker, theirs: Worker, fleet: Fleet, blocks_per_event: int, rounds: int, *, reach: float | None
) -> list[Result]:
    rates: dict[str, list[float]] = {"kvatlas": [], "dynamo": []}
    for _ in range(rounds):
        for side in (ours, theirs):
            took = side.ask("ingest", fleet=msgspec.to_builtins(fleet), blocks_per_event=blocks_per_event)
            rates[side.side].append(took["blocks"] / took["cpu_s"])
    return [
        against(
            NAME,
            f"in process: {_what(fleet, blocks_per_event)}",
            median(rates["kvatlas"]),
            _UNIT,
            f"{DYNAMO} RadixTree, JSON",
            median(rates["dynamo"]),
            higher_is_better=True,
            reach=reach,
        )
    ]
