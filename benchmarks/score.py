"""A prompt of 32,768 tokens to a dictionary of pod to blocks matched. Wall time in microseconds.

Ours: ``NativeIndex.score(tokens).to_dict()``, the tokens in a buffer (``array('I')``) and in a Python list. Dynamo's:
``compute_block_hash_for_seq(tokens, 16)`` and ``RadixTree.find_matches(...).scores``, the tokens in a list: arrays are taken
too, but read as sequences, which is twice as slow. Both are fed the same blocks (1M entries; every pod holds every prompt to
a depth of its own), asked for 16 prompts in turn, and their answers are checked against each other first.
"""

from __future__ import annotations

from benchmarks import queries
from benchmarks.result import Result, against
from benchmarks.sides import DYNAMO, Placement, both
from benchmarks.streams import BLOCK_TOKENS, CHAIN_BLOCKS

NAME = "score"


def run(*, quick: bool, place: Placement) -> list[Result]:
    results = []
    with both(place) as (ours, theirs):
        for pods in (8, 64) if quick else (8, 256):
            fleet = queries.fleet_of(300_000 if quick else 1_000_000, pods)
            prompts = queries.load(ours, theirs, fleet)
            given = {"prompts": prompts, "rounds": 100}
            samples = queries.interleaved(
                {
                    "a buffer": (ours, "score_us", {**given, "buffer": True}),
                    "dynamo": (theirs, "score_us", {**given, "buffer": False}),
                    "a Python list": (ours, "score_us", {**given, "buffer": False}),
                    "hash": (theirs, "hash_us", given),
                },
                turns=3 if quick else 10,
            )
            baseline = queries.percentiles(samples.pop("dynamo"))
            hashing = queries.percentiles(samples.pop("hash"))
            for tokens, reach in (("a buffer", 5.0), ("a Python list", 2.0)):
                for percent, value in queries.percentiles(samples[tokens]).items():
                    what = f"{CHAIN_BLOCKS * BLOCK_TOKENS:,} tokens from {tokens}, {pods} pods, {fleet.entries:,} entries"
                    results.append(
                        against(
                            NAME,
                            f"{what}, p{percent}",
                            value,
                            "us",
                            f"{DYNAMO} hash + find",
                            baseline[percent],
                            higher_is_better=False,
                            reach=reach,
                        )
                    )
                    alone = f"{DYNAMO} hash alone"
                    results.append(
                        against(NAME, f"{what}, p{percent}", value, "us", alone, hashing[percent], higher_is_better=False)
                    )
    return results
