"""The longest prefix by keys: keys in, a dictionary of pod to blocks matched out. Wall time in microseconds.

Ours: ``NativeIndex.find(keys).to_dict()``, the keys in a Python list and in a buffer (``array('Q')``). Dynamo's:
``RadixTree.find_matches(keys).scores``, the keys in a list (the faster of what it takes). 1M entries; every pod holds every
prompt to a depth of its own; 16 prompts asked in turn; the sides' answers are checked against each other first.
"""

from __future__ import annotations

from benchmarks import queries
from benchmarks.result import Result, against
from benchmarks.sides import DYNAMO, Placement, both

NAME = "find"


def run(*, quick: bool, place: Placement) -> list[Result]:
    results = []
    with both(place) as (ours, theirs):
        for pods in (8,) if quick else (8, 256):
            fleet = queries.fleet_of(300_000 if quick else 1_000_000, pods)
            prompts = queries.load(ours, theirs, fleet)
            for blocks in (128, 512, 2_000):
                given = {"prompts": prompts, "blocks": blocks, "rounds": 200}
                samples = queries.interleaved(
                    {
                        "a Python list": (ours, "find_us", {**given, "buffer": False}),
                        "dynamo": (theirs, "find_us", {**given, "buffer": False}),
                        "a buffer": (ours, "find_us", {**given, "buffer": True}),
                    },
                    turns=3 if quick else 10,
                )
                baseline = queries.percentiles(samples.pop("dynamo"))
                for keys, took_us in samples.items():
                    for percent, value in queries.percentiles(took_us).items():
                        results.append(
                            against(
                                NAME,
                                f"{blocks:,} keys from {keys}, {pods} pods, {fleet.entries:,} entries, p{percent}",
                                value,
                                "us",
                                f"{DYNAMO} RadixTree",
                                baseline[percent],
                                higher_is_better=False,
                                reach=2.0 if percent == 50 else None,
                            )
                        )
    return results
