"""What every side measures, by the same code: an index behind few operations, its clock around the same calls.

Throughput is in CPU time of the whole process (all threads), latency in wall time. Inputs are made before the clock starts.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.streams import CHAIN_BLOCKS, Chain, Fleet, Part

TURN_PAYLOADS = 32
"""What is found waiting of one pod: pods are served in turns of so many payloads."""

Turn = tuple[int, list[bytes]]
"""A pod, and payloads of it in order."""


class MeasuredSide(ABC):
    """One index. Methods up to ``restore`` are what a side can do; those after it measure, and are asked for by name."""

    _prepared: tuple[tuple[Fleet, int], list[Turn]] | None = None
    """What was stored last, for the next round of the same."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Return what runs here."""

    @abstractmethod
    def new(self) -> None:
        """Begin with an empty index."""

    @abstractmethod
    def stored(self, chain: Chain, blocks_per_event: int, start: int, stop: int) -> list[bytes]:
        """Return the payloads that store blocks of a chain, one event each."""

    @abstractmethod
    def removed(self, chain: Chain, hashes_per_event: int, events_per_payload: int) -> list[bytes]:
        """Return the payloads that remove a chain, its end first."""

    @abstractmethod
    def apply(self, pod: int, payloads: list[bytes]) -> None:
        """Apply payloads of a pod."""

    @abstractmethod
    def check(self, entries: int) -> None:
        """Raise if the index does not hold so many entries, where it can tell."""

    @abstractmethod
    def settle(self) -> None:
        """Return when all that was applied can be seen."""

    @abstractmethod
    def keys(self, chain: Chain) -> list[int]:
        """Return what a query by keys takes for a chain's blocks."""

    @abstractmethod
    def find(self, keys: Any) -> Mapping[Any, int]:
        """Return the blocks matched by each pod."""

    @abstractmethod
    def score(self, tokens: Any) -> Mapping[Any, int]:
        """Return the same, from tokens."""

    @abstractmethod
    def buffer(self, values: Sequence[int], code: str) -> Any:
        """Return a list's values as the buffer that this side takes; or the list, where it has no use for buffers."""

    @abstractmethod
    def by_pod(self, answer: Mapping[Any, int]) -> dict[int, int]:
        """Return an answer by pod number."""

    @abstractmethod
    def remove(self, pod: int) -> None:
        """Remove a pod and all that it holds."""

    @abstractmethod
    def clean_up(self) -> None:
        """Do what removal left for later, if anything was."""

    @abstractmethod
    def snapshot(self) -> bytes:
        """Return the whole content as bytes that can be written to a file."""

    @abstractmethod
    def restore(self, snapshot: bytes) -> None:
        """Fill an empty index from a snapshot."""

    # Measurements.

    def ingest(self, fleet: dict[str, Any], blocks_per_event: int) -> dict[str, float]:
        """Store a fleet's blocks in a new index."""
        made = Fleet(**fleet)
        if self._prepared is None or self._prepared[0] != (made, blocks_per_event):
            self._prepared = None
            self._prepared = ((made, blocks_per_event), list(self._arrivals(made, blocks_per_event)))
        turns = self._prepared[1]
        self.new()
        took = self._timed(lambda: self._feed(turns))
        self.check(made.entries)
        return {"blocks": made.entries, **took}

    def removal(self, fleet: dict[str, Any], hashes_per_event: int, events_per_payload: int) -> dict[str, float]:
        """Remove, event by event, all that a fleet holds."""
        made = Fleet(**fleet)
        self.load(fleet)
        turns: list[Turn] = []
        for part in made.parts():
            payloads = self.removed(Chain(part.chain), hashes_per_event, events_per_payload)
            turns += [(part.pod, payloads[at : at + TURN_PAYLOADS]) for at in range(0, len(payloads), TURN_PAYLOADS)]
        took = self._timed(lambda: self._feed(turns))
        left = self.by_pod(self.find(self.keys(Chain(made.first_chain))))
        assert not any(left.values()), f"blocks are left after all were removed: {left}"
        self.check(0)
        return {"blocks": made.entries, **took}

    def load(self, fleet: dict[str, Any]) -> int:
        """Fill a new index without measuring; return its entries."""
        self.new()
        return self.add(fleet)

    def add(self, fleet: dict[str, Any]) -> int:
        """Add a fleet's blocks without measuring; return how many."""
        made = Fleet(**fleet)
        for pod, payloads in self._parts(made, 64):
            self.apply(pod, payloads)
        self.settle()
        return made.entries

    def find_us(self, prompts: list[int], blocks: int, rounds: int, buffer: bool) -> list[float]:
        """Return the time of every query of the first ``blocks`` keys of prompts, in turn."""
        asked = []
        for prompt in prompts:
            keys = self.keys(Chain(prompt))[:blocks]
            asked.append(self.buffer(keys, "Q") if buffer else keys)
        return self._latencies_us(self.find, asked, rounds)

    def score_us(self, prompts: list[int], rounds: int, buffer: bool) -> list[float]:
        """Return the time from a prompt's tokens to the blocks matched by each pod."""
        asked = []
        for prompt in prompts:
            tokens = Chain(prompt).tokens.tolist()
            asked.append(self.buffer(tokens, "I") if buffer else tokens)
        return self._latencies_us(self.score, asked, rounds)

    def answers(self, prompts: list[int], blocks: int) -> list[list[list[int]]]:
        """Return what queries find, by keys and by tokens, so that sides can be compared."""
        found = []
        for prompt in prompts:
            chain = Chain(prompt)
            found.append(self.by_pod(self.find(self.keys(chain)[:blocks])))
            found.append(self.by_pod(self.score(chain.tokens.tolist())))
        return [sorted([pod, count] for pod, count in answer.items() if count) for answer in found]

    def memory(self, fleet: dict[str, Any]) -> dict[str, int]:
        """Return the resident bytes that a fleet's blocks add. Freed memory is given back to the system before each look."""
        self.load({"chains": 2, "pods": 2})  # what is imported, cached or started once is no entry's
        self.new()
        before = resident_bytes()
        entries = self.add(fleet)
        return {"bytes": resident_bytes() - before, "entries": entries}

    def grow(self, fleet: dict[str, Any], blocks_per_event: int) -> dict[str, float]:
        """Fill a new index chain by chain, so that fleets too large to be prepared can be measured too: time and memory."""
        self.load({"chains": 2, "pods": 2})
        self.new()
        before = resident_bytes()
        cpu_s = 0.0
        made = Fleet(**fleet)
        for pod, payloads in self._parts(made, blocks_per_event):
            started = time.process_time()
            self.apply(pod, payloads)
            cpu_s += time.process_time() - started
        started = time.process_time()
        self.settle()
        cpu_s += time.process_time() - started
        self.check(made.entries)
        return {"blocks": made.entries, "cpu_s": cpu_s, "bytes": resident_bytes() - before}

    def remove_pod(self, fleet: dict[str, Any], rounds: int) -> list[float]:
        """Remove pod 0 of a loaded fleet, again and again; return the milliseconds until queries no longer see it."""
        parts = [part for part in Fleet(**fleet).parts() if part.pod == 0]
        prompt = self.keys(Chain(parts[0].chain))[:1]
        took_ms = []
        for _ in range(rounds):
            assert 0 in self.by_pod(self.find(prompt))
            with _no_garbage_collection():
                started = time.perf_counter()
                self.remove(0)
                seen = self.find(prompt)
                took_ms.append((time.perf_counter() - started) * 1e3)
            assert 0 not in self.by_pod(seen)
            for part in parts:
                self.apply(0, self.stored(Chain(part.chain), 64, 0, part.blocks))
        return took_ms

    def remove_pods(self, fleet: dict[str, Any]) -> float:
        """Remove all pods of a new fleet one by one, with all clean-up that comes due; return milliseconds a pod."""
        self.load(fleet)
        pods = Fleet(**fleet).pods
        with _no_garbage_collection():
            started = time.perf_counter()
            for pod in range(pods):
                self.remove(pod)
                self.clean_up()
            self.settle()
            took_s = time.perf_counter() - started
        self.check(0)
        return took_s * 1e3 / pods

    def snapshots(self, fleet: dict[str, Any]) -> dict[str, float]:
        """Take a snapshot of a fleet, restore it into a new index, check what it finds."""
        entries = self.load(fleet)
        taken: list[bytes] = []
        took = self._timed(lambda: taken.append(self.snapshot()))
        keys = self.keys(Chain(Fleet(**fleet).first_chain))
        before = self.by_pod(self.find(keys))
        self.new()
        restored = self._timed(lambda: self.restore(taken[0]))
        assert self.by_pod(self.find(keys)) == before, "the restored index answers otherwise"
        return {"entries": entries, "bytes": len(taken[0]), "snapshot_s": took["cpu_s"], "restore_s": restored["cpu_s"]}

    def readers(self, prompts: list[int], blocks: int, seconds: float, rounds: int, writer_core: int | None) -> dict[str, Any]:
        """Ask in one thread: alone, and while another thread stores and removes without pause; in turns."""
        asked = [self.buffer(self.keys(Chain(prompt))[:blocks], "Q") for prompt in prompts]
        idle_us: list[float] = []
        busy_us: list[float] = []
        rates: list[float] = []
        writer = _Writer(self, Fleet(chains=24, pods=8, first_chain=5_000_000), writer_core)
        with _no_garbage_collection():
            self._ask_for(seconds / 10, asked)
            for _ in range(rounds):
                idle_us += self._ask_for(seconds, asked)
                with writer.writing():
                    busy_us += self._ask_for(seconds, asked)
                rates.append(writer.blocks_per_s)
        return {"idle_us": idle_us, "busy_us": busy_us, "blocks_per_s": rates}

    def threads(self, prompts: list[int], count: int, seconds: float) -> dict[str, float]:
        """Return what ``count`` threads reach together: queries of 512 keys a second, and blocks stored a second."""
        asked = [self.buffer(self.keys(Chain(prompt))[:512], "Q") for prompt in prompts]
        finds = [0] * count
        fleets = [Fleet(chains=8, pods=1, first_chain=6_000_000 + 8 * index) for index in range(count)]
        turns = [list(self._arrivals(fleet, 64)) for fleet in fleets]
        took = [0.0] * count

        def read(index: int) -> None:
            finds[index] = len(self._ask_for(seconds, asked))

        def write(index: int) -> None:
            started = time.perf_counter()
            for _, payloads in turns[index]:
                self.apply(1_000 + index, payloads)
            took[index] = time.perf_counter() - started

        _together(count, read)
        started = time.perf_counter()
        _together(count, write)
        self.settle()
        stored_s = time.perf_counter() - started
        for index in range(count):
            self.remove(1_000 + index)
        self.clean_up()
        return {"finds_per_s": sum(finds) / seconds, "blocks_per_s": count * 8 * CHAIN_BLOCKS / stored_s}

    # How they do it.

    def _parts(self, fleet: Fleet, blocks_per_event: int) -> Iterator[Turn]:
        """Yield the payloads of every part; a chain's events are made once for all pods that hold it."""
        chain: Chain | None = None
        number = -1
        whole: list[bytes] = []
        for part in fleet.parts():
            if chain is None or part.chain != number:
                chain, number = Chain(part.chain), part.chain
                whole = self.stored(chain, blocks_per_event, 0, CHAIN_BLOCKS)
            yield part.pod, self._up_to(part, chain, whole, blocks_per_event)

    def _up_to(self, part: Part, chain: Chain, whole: list[bytes], blocks_per_event: int) -> list[bytes]:
        events, rest = divmod(part.blocks, blocks_per_event)
        payloads = whole[:events]
        if rest:
            payloads += self.stored(chain, blocks_per_event, part.blocks - rest, part.blocks)
        return payloads

    def _arrivals(self, fleet: Fleet, blocks_per_event: int) -> Iterator[Turn]:
        """Yield all payloads as an index with many pods gets them: some of each pod, in turn."""
        waiting: dict[int, deque[bytes]] = {}
        for pod, payloads in self._parts(fleet, blocks_per_event):
            waiting.setdefault(pod, deque()).extend(payloads)
        while waiting:
            for pod in list(waiting):
                queue = waiting[pod]
                yield pod, [queue.popleft() for _ in range(min(TURN_PAYLOADS, len(queue)))]
                if not queue:
                    del waiting[pod]

    def _feed(self, turns: list[Turn]) -> None:
        for pod, payloads in turns:
            self.apply(pod, payloads)
        self.settle()

    def _ask_for(self, seconds: float, asked: Sequence[Any]) -> list[float]:
        """Ask without pause; return the time of every query."""
        took_us = []
        find = self.find
        clock = time.perf_counter
        ended = clock()
        until = ended + seconds
        turn = 0
        while ended < until:
            keys = asked[turn % len(asked)]
            turn += 1
            started = clock()
            find(keys)
            ended = clock()
            took_us.append((ended - started) * 1e6)
        return took_us

    @staticmethod
    def _latencies_us(work: Callable[[Any], object], asked: Sequence[Any], rounds: int) -> list[float]:
        for one in asked:
            work(one)
        took_us = []
        clock = time.perf_counter
        with _no_garbage_collection():
            for turn in range(rounds):
                one = asked[turn % len(asked)]
                started = clock()
                work(one)
                took_us.append((clock() - started) * 1e6)
        return took_us

    @staticmethod
    def _timed(work: Callable[[], object]) -> dict[str, float]:
        with _no_garbage_collection():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


class _Writer:
    """A thread that stores and removes the same blocks over and over, as fast as it can."""

    def __init__(self, side: MeasuredSide, fleet: Fleet, core: int | None) -> None:
        self._side = side
        self._core = core
        self._blocks = fleet.entries
        self._rounds: list[list[Turn]] = [
            list(side._arrivals(fleet, 64)),
            [(part.pod, side.removed(Chain(part.chain), 64, 1)) for part in fleet.parts()],
        ]
        self._stop = threading.Event()
        self.blocks_per_s = 0.0

    @contextmanager
    def writing(self) -> Iterator[None]:
        self._stop.clear()
        thread = threading.Thread(target=self._write)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _write(self) -> None:
        if self._core is not None:
            os.sched_setaffinity(0, {self._core})  # 0: this thread
        started = time.perf_counter()
        rounds = 0
        while not self._stop.is_set():
            for turns in self._rounds:
                for pod, payloads in turns:
                    self._side.apply(pod, payloads)
            rounds += 1
        self.blocks_per_s = rounds * 2 * self._blocks / (time.perf_counter() - started)


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector out of what is timed: on both sides it would walk the prepared payloads."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _together(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
