"""The Python reference: how fast it takes events, how fast it answers, what an entry costs in memory.

All figures are of one thread: payload bytes in, index updated (decode, keys, copies); tokens in, scores out.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from benchmarks.result import Result, percentile
from benchmarks.sides import Placement
from benchmarks.streams import BLOCK_TOKENS, Chain
from kvatlas.config import Config, IndexSettings, KeySettings
from kvatlas.config.quantities import Bytes
from kvatlas.indexer import Indexer
from kvatlas.ingest.decode.vllm import VllmDecoder
from kvatlas.results import Query
from kvatlas.types import EventBatch, PodId, Stream

NAME = "reference"


def new_indexer() -> Indexer:
    settings = IndexSettings(max_size=100_000_000, max_bytes=Bytes(1 << 40))
    return Indexer(Config(keys=KeySettings(block_size=BLOCK_TOKENS), index=settings))


def apply(indexer: Indexer, pod: int, payloads: Iterable[bytes]) -> None:
    decoder = VllmDecoder()
    stream = Stream(PodId(f"10.0.0.{pod}:8000"))
    for payload in payloads:
        for batch in decoder.decode(payload).batches:
            indexer.index.apply(stream, EventBatch(batch.events, batch.timestamp_s, model="m"))


def cpu_seconds(work: Callable[[], None]) -> float:
    gc.collect()
    started = time.process_time()
    work()
    return time.process_time() - started


def figure(scenario: str, value: float, unit: str, *, higher_is_better: bool) -> Result:
    return Result(NAME, scenario, value, unit, higher_is_better)


def ingest(blocks: int, pods: int, blocks_per_event: int) -> list[Result]:
    """Store and then remove ``blocks`` blocks, spread over ``pods``."""
    chains = [Chain(i) for i in range(max(1, blocks // 2048))]
    stored = [(i % pods, list(chain.stored(blocks_per_event))) for i, chain in enumerate(chains)]
    removed = [(i % pods, list(chain.removed())) for i, chain in enumerate(chains)]
    indexer = new_indexer()
    count = sum(len(chain.hashes) for chain in chains)

    def feed(work: list[tuple[int, list[bytes]]]) -> None:
        for pod, payloads in work:
            apply(indexer, pod, payloads)

    what = f"{count:,} blocks, {pods} pods, {blocks_per_event} blocks an event"
    results = [figure(f"ingest: {what}", count / cpu_seconds(lambda: feed(stored)), "blocks/s", higher_is_better=True)]
    assert indexer.stats().entries == count
    if blocks_per_event > 1:
        rate = count / cpu_seconds(lambda: feed(removed))
        results.append(figure(f"removal: {count:,} blocks, {pods} pods", rate, "blocks/s", higher_is_better=True))
        assert indexer.stats().entries == 0
    return results


def queries(pods: int, rounds: int) -> list[Result]:
    """Ask for a prompt that every pod holds to a different depth."""
    indexer = new_indexer()
    chain = Chain(0)
    payloads = list(chain.stored(64))
    for pod in range(pods):
        apply(indexer, pod, payloads[: 1 + pod * (len(payloads) - 1) // max(1, pods - 1)])
    results = []
    for tokens in (2_048, 32_768):
        query = Query(chain.tokens[:tokens], "m")
        took_s = timed(partial(indexer.score, query), rounds)
        results += latency(f"score: {tokens:,} tokens, {pods} pods", took_s)
    keys = indexer.block_keys(Query(chain.tokens, "m"))
    for count in (128, 512, 2_000):
        took_s = timed(partial(indexer.index.lookup, keys[:count]), rounds)
        results += latency(f"find: {count:,} blocks by key, {pods} pods", took_s)
    return results


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    work()
    took_s = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        took_s.append(time.perf_counter() - started)
    return took_s


def latency(scenario: str, took_s: list[float]) -> list[Result]:
    return [
        figure(f"{scenario}, p{percent}", percentile(took_s, percent / 100) * 1e6, "us", higher_is_better=False)
        for percent in (50, 99)
    ]


def memory(blocks: int) -> list[Result]:
    """Measure in processes of their own, so that nothing else is counted."""
    results = []
    for scenario, pods in (("unique blocks", 1), ("the same blocks on 8 pods", 8)):
        command = [sys.executable, "-m", "benchmarks.reference", str(blocks), str(pods)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
        measured, estimated, entries = (float(part) for part in answer.stdout.split())
        what = f"memory: {int(entries):,} entries, {scenario}"
        results.append(figure(f"{what}, measured", measured / entries, "bytes/entry", higher_is_better=False))
        results.append(figure(f"{what}, as the index estimates", estimated / entries, "bytes/entry", higher_is_better=False))
    return results


def measure_memory(blocks: int, pods: int) -> None:
    """Print resident bytes added, the index's own estimate, and entries."""
    apply(new_indexer(), 0, Chain(1, 64).stored(64))  # what is imported and cached once is not an entry's
    indexer = new_indexer()
    gc.collect()
    before = resident_bytes()
    for number in range(max(1, blocks // 2048)):
        for pod in range(pods):
            apply(indexer, pod, Chain(number).stored(64))
    gc.collect()
    stats = indexer.stats()
    print(resident_bytes() - before, stats.bytes_estimated, stats.entries)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096


def run(*, quick: bool, place: Placement) -> list[Result]:
    os.sched_setaffinity(0, place.measured)
    blocks = 40_000 if quick else 400_000
    results = []
    for pods in (8,) if quick else (8, 64, 256):
        results += ingest(blocks, pods, 64)
    results += ingest(blocks // 4, 8, 1)
    for pods in (8, 64) if quick else (8, 256):
        results += queries(pods, 20 if quick else 100)
    results += memory(blocks)
    return results


if __name__ == "__main__":
    measure_memory(int(sys.argv[1]), int(sys.argv[2]))
