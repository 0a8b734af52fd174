"""Threads that ask, promise and give up while others apply: no exception, sane answers, and at the end the same state."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

pytest.importorskip("kvatlas._native")

from kvatlas.index import IndexLimits, ReferenceIndex
from kvatlas.index.native import NativeIndex, Weighing
from kvatlas.keys import as_token_array
from kvatlas.types import Lookup, PodId, StaleReason, Stream
from tests.models.lockstep import readable
from tests.models.steps import SCHEMA, Engines, Step, batch, keys_of, prompt_of

ENGINES = Engines((4, 4, 4, 8, 2), prompt_tokens=240)
BATCHES = 250
WRITERS = 4


def sequence(number: int) -> list[Step]:
    """What one writer does to its own stream."""
    pick = random.Random(number).randrange
    stream = Stream(PodId(f"pod-{number}"))
    steps: list[Step] = []
    for i in range(BATCHES):
        steps.append(("apply", stream, batch(pick, ENGINES, stream)))
        if i % 60 == 30:
            steps.append(("drop" if pick(2) else "forget", stream))
        if i % 40 == 20:
            steps.append(("mark", stream, StaleReason.GAP if pick(2) else None))
    return steps


def follow(index: NativeIndex | ReferenceIndex, steps: list[Step]) -> list[object]:
    return [getattr(index, name)(*arguments) for name, *arguments in steps]


class Crowd:
    """Threads that go on until the writers are done, and what went wrong in any."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.errors: list[BaseException] = []
        self.rounds = 0

    def run(self, writers: list[Callable[[], object]], others: list[Callable[[], object]]) -> None:
        writing = [threading.Thread(target=self._guard, args=(writer,)) for writer in writers]
        rest = [threading.Thread(target=self._guard, args=(self._again(other),)) for other in others]
        for thread in (*rest, *writing):
            thread.start()
        for thread in writing:
            thread.join()
        self.done.set()
        for thread in rest:
            thread.join()
        assert not self.errors
        assert self.rounds > 0

    def _again(self, act: Callable[[], object]) -> Callable[[], None]:
        def loop() -> None:
            while not self.done.is_set():
                act()
                self.rounds += 1

        return loop

    def _guard(self, act: Callable[[], object]) -> None:
        try:
            act()
        except BaseException as error:  # handed to the test's own thread, which fails
            self.errors.append(error)
            self.done.set()


def readers(index: NativeIndex) -> list[Callable[[], object]]:
    pick = random.Random(99).randrange
    prompts = [as_token_array(prompt_of(number, 240)) for number in range(16)]
    all_keys = [keys_of(ENGINES, number, 0, "m") for number in range(16)]

    def look() -> None:
        keys = all_keys[pick(16)]
        check_lookup(index.lookup(keys, [PodId("pod-1"), PodId("pod-2")] if pick(2) else None), len(keys))

    def score() -> None:
        for scorer in ("longest-prefix", "highest-block-hit", "coverage"):
            check_rows(index.score(prompts[pick(16)], "m", weighing=Weighing(scorer)))

    def find() -> None:
        check_rows(index.find(all_keys[pick(16)], prompt_tokens=243, model="m"))

    def sizes() -> None:
        stats = index.stats()
        assert stats.blocks <= stats.entries
        assert stats.pods <= stats.streams
        assert all(0 <= info.orphans <= info.blocks for info in index.streams().values())

    return [look, score, find, sizes]


def check_lookup(lookup: Lookup, blocks: int) -> None:
    assert len(lookup.holders) == len(lookup.speculative) == blocks
    for slots in lookup.holders:
        assert all(copies > 0 and slot.stream in lookup.streams for slot, copies in slots.items())


def check_rows(scores: object) -> None:
    names = set()
    for pod, rank, _model, score, blocks, tokens, cached, tiers, speculative, _stale in scores.rows():
        names.add((pod, rank))
        assert score >= 0.0
        assert tokens == 4 * blocks
        assert cached <= tokens <= 240
        assert sum(count for _, count in tiers) == blocks
        assert speculative <= blocks
    assert len(names) == len(scores.rows())
    assert 0 <= scores.blocks_held <= 60


def test_writers_and_readers_at_once_leave_what_the_reference_has() -> None:
    """Each stream's steps come in order, streams in any: without limits that streams share, the outcome is the same."""
    limits = IndexLimits(bytes_max=1 << 40, orphans_max=40, retired_max=40)
    native, reference = NativeIndex(SCHEMA, limits, lambda: 0.0), ReferenceIndex(SCHEMA, limits, lambda: 0.0)
    sequences = [sequence(number) for number in range(WRITERS)]
    answers: dict[int, list[object]] = {}
    crowd = Crowd()
    writers = [
        lambda number=number: answers.__setitem__(number, follow(native, sequences[number])) for number in range(WRITERS)
    ]
    crowd.run(writers, readers(native))
    for number in range(WRITERS):
        assert answers[number] == follow(reference, sequences[number]), f"writer {number}"
    assert native.streams() == reference.streams()
    keys = list(reference._holders)
    assert keys
    assert readable(native.lookup(keys)) == readable(reference.lookup(keys))
    stats = native.stats()
    assert (stats.blocks, stats.entries, stats.orphans) == (len(keys), reference.stats().entries, reference.stats().orphans)


def test_nothing_breaks_where_blocks_expire_and_are_evicted_at_the_same_time() -> None:
    now_s = [0.0]
    limits = IndexLimits(ttl_s=5.0, blocks_max=200, bytes_max=200_000, orphans_max=20, retired_max=20, promises_max=50)
    index = NativeIndex(SCHEMA, limits, lambda: now_s[0])
    pick = random.Random(7).randrange

    def promise() -> None:
        index.promise(Stream(PodId(f"pod-{pick(6)}")), keys_of(ENGINES, pick(16), 0, "m")[: pick(60)], 2.0)

    def pass_time() -> None:
        now_s[0] += 0.01
        index.expire()

    Crowd().run(
        [lambda number=number: follow(index, sequence(number)) for number in range(WRITERS)],
        [*readers(index), promise, pass_time],
    )
    now_s[0] += 100.0
    index.expire()
    stats = index.stats()
    assert (stats.blocks, stats.entries, stats.speculative) == (0, 0, 0)
    for stream in index.streams():
        index.forget(stream)
    assert index.stats().streams == index.stats().orphans == 0
