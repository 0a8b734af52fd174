"""Events with lag and loss, judged by the write path's rules."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from kvatlas.config import Config, IndexSettings
from kvatlas.indexer import Indexer
from kvatlas.results import Query
from kvatlas.sim.chains import Chains
from kvatlas.sim.engines import EngineSpec, Job, TierSpec
from kvatlas.sim.events import PUBLISHED_MAX, EventPath, EventStream
from kvatlas.sim.frame import Frame
from kvatlas.sim.policies.policy import MODEL
from kvatlas.sim.request import Request
from kvatlas.types import GPU, PodId, StaleReason, Stream, Tier
from tests.models.workloads import COSTS, arrival, tokens

_STREAM = Stream(PodId("engine-0"))
_SPEC = EngineSpec(costs=COSTS, gpu_blocks=1_000, tiers=(TierSpec(name="cpu", blocks=10, load_block_s=0.001),))


class Engine:
    """One engine's stream, and the index that it ends in."""

    def __init__(self, lose: set[int] = frozenset(), **path: float | None) -> None:  # type: ignore[assignment]
        """``lose``: the frames that are lost, by their number."""
        self.indexer = Indexer(Config(), clock=lambda: 0.0)
        self.stream = EventStream(
            _STREAM, MODEL, self.indexer.index, self.indexer.metrics, EventPath(loss=0.5 if lose else 0.0, **path)
        )  # type: ignore[arg-type]
        self._lose = lose
        self._frames = 0

    def random(self) -> float:
        self._frames += 1
        return 0.0 if self._frames - 1 in self._lose else 1.0

    def stores(self, at_s: float, request: Request, first: int, many: int, tier: int = 0) -> None:
        self.stream.publish(at_s, stored(at_s, request, (first, many, tier)), self)  # type: ignore[arg-type]

    def removes(self, at_s: float, *keys: int, tier: int = 0) -> None:
        self.stream.publish(at_s, removed(at_s, keys, tier), self)  # type: ignore[arg-type]

    def held(self, request: Request, now_s: float) -> int:
        """Return how many of a prompt's blocks the index knows of."""
        self.stream.deliver(now_s)
        rows = self.indexer.match(Query(request.prompt, MODEL)).streams
        return next((row.matched_blocks for row in rows), 0)


def request(number: int = 1, blocks: int = 6) -> Request:
    asked = arrival(0.0, tokens(number, blocks * 16 + 1))
    return Request(number, asked, 0.0, Chains(16, MODEL).keys(asked.tokens), blocks)


def stored(at_s: float, request: Request, *blocks: tuple[int, int, int]) -> bytes:
    """``blocks``: the first, how many, and their tier."""
    frame, asked = Frame(_SPEC), request.arrival
    job = Job(request.id, request.keys, asked.prompt_tokens, asked.output_tokens, asked.tokens)
    for first, many, tier in blocks:
        frame.stored(job, first, many, tier)
    return taken(frame, at_s)


def removed(at_s: float, keys: Sequence[int], tier: int = 0) -> bytes:
    frame = Frame(_SPEC)
    frame.removed(keys, tier)
    return taken(frame, at_s)


def taken(frame: Frame, at_s: float) -> bytes:
    payload = frame.take(at_s)
    assert payload is not None
    return payload


def test_what_is_stored_is_known_after_the_lag() -> None:
    engine, asked = Engine(lag_s=0.5), request()
    engine.stream.publish(1.0, stored(1.0, asked, (0, 4, 0), (4, 1, 0)), engine)  # type: ignore[arg-type]
    assert [engine.held(asked, at_s) for at_s in (1.0, 1.49, 1.5)] == [0, 0, 5]


def test_what_is_removed_is_gone() -> None:
    engine, asked = Engine(), request()
    engine.stores(1.0, asked, 0, 6)
    engine.removes(2.0, *asked.keys[4:6])
    assert [engine.held(asked, at_s) for at_s in (1.0, 2.0)] == [6, 4]


def test_tiers_have_their_names() -> None:
    engine, asked = Engine(), request()
    engine.stores(1.0, asked, 0, 6)
    engine.stores(1.0, asked, 0, 6, tier=1)
    engine.removes(2.0, *asked.keys[3:6])
    assert engine.held(asked, 3.0) == 6
    (row,) = engine.indexer.match(Query(asked.prompt, MODEL)).streams
    assert row.tiers == {GPU: 3, Tier("cpu"): 3}


def test_frames_do_not_overtake_each_other() -> None:
    engine, asked, rng = Engine(jitter_s=1.0), request(), random.Random(1)
    for block in range(6):
        engine.stream.publish(block / 100, stored(block / 100, asked, (block, 1, 0)), rng)
    held = [engine.held(asked, at_s / 100) for at_s in range(120)]
    assert held == sorted(held)
    assert held[-1] == 6


def test_a_gap_is_seen_with_the_next_frame_and_healed_by_a_replay() -> None:
    engine, asked = Engine(lose={1}, replay_after_s=0.5), request()
    for block in range(4):
        engine.stores(float(block), asked, block, 1)
    assert (engine.held(asked, 1.9), engine.stream.stale) == (1, None)  # nothing has told of it yet
    assert (engine.held(asked, 2.4), engine.stream.stale) == (1, StaleReason.RESYNCING)
    assert (engine.held(asked, 2.5), engine.stream.stale) == (3, None)
    assert (engine.held(asked, 3.0), engine.stream.stale) == (4, None)
    assert (engine.stream.lost, engine.stream.gaps) == (1, 1)


def test_what_is_lost_while_a_replay_runs_comes_with_it() -> None:
    engine, asked = Engine(lose={1, 3}, replay_after_s=1.5), request()
    for block in range(5):
        engine.stores(float(block), asked, block, 1)
    assert engine.held(asked, 3.5) == 4  # frames 0 to 3: seen at 2, healed at 3.5
    assert engine.held(asked, 4.0) == 5
    assert engine.stream.gaps == 1


def test_without_a_replay_a_stream_stays_stale() -> None:
    engine, asked = Engine(lose={1}, replay_after_s=None), request()
    for block in range(6):
        engine.stores(float(block), asked, block, 1)
    assert engine.held(asked, 10.0) == 1  # what follows has no parent
    assert engine.stream.stale is StaleReason.GAP
    assert engine.indexer.index.streams()[_STREAM].stale is StaleReason.GAP


def test_an_engine_keeps_a_bounded_number_of_frames() -> None:
    engine, asked = Engine(lose=set(range(PUBLISHED_MAX + 5)), replay_after_s=0.0), request()
    for step in range(PUBLISHED_MAX + 5):
        engine.stores(float(step), asked, 0, 1)
    engine.stores(1e6, asked, 1, 1)
    assert engine.held(asked, 2e6) == 2
    assert engine.stream.stale is StaleReason.HISTORY_INCOMPLETE


def test_frames_that_nobody_looks_at_are_not_lost() -> None:
    engine, asked = Engine(), request()
    for step in range(2 * PUBLISHED_MAX + 10):
        if step % 2:
            engine.removes(float(step), asked.keys[0])
        else:
            engine.stores(float(step), asked, 0, 1)
    assert engine.held(asked, 1e6) == 0
    assert engine.stream.gaps == 0


def test_an_index_that_reads_no_payloads_is_told_the_same() -> None:
    indexers = [Indexer(Config(index=IndexSettings(core=core)), clock=lambda: 0.0) for core in ("auto", "reference")]
    asked = request()
    for indexer in indexers:
        stream = EventStream(_STREAM, MODEL, indexer.index, indexer.metrics, EventPath())
        stream.publish(0.0, stored(0.0, asked, (0, 6, 0), (0, 6, 1)), random.Random(1))
        stream.publish(1.0, removed(1.0, asked.keys[3:6]), random.Random(1))
        stream.deliver(1.0)
    found = [indexer.match(Query(asked.prompt, MODEL)) for indexer in indexers]
    assert found[0].streams == found[1].streams
    assert found[0].streams[0].tiers == {GPU: 3, Tier("cpu"): 3}


@pytest.mark.parametrize("loss", [0.1, 0.6])
def test_after_any_losses_a_healed_stream_is_exact(loss: float) -> None:
    rng = random.Random(7)
    indexer = Indexer(Config(), clock=lambda: 0.0)
    path = EventPath(lag_s=0.01, jitter_s=0.2, loss=loss, replay_after_s=0.3)
    stream = EventStream(_STREAM, MODEL, indexer.index, indexer.metrics, path)
    requests = [request(number) for number in range(5)]
    held = dict.fromkeys(range(5), 0)
    for step in range(400):
        at_s, number = step / 20, rng.randrange(5)
        asked = requests[number]
        if held[number] and rng.random() < 0.4:
            held[number] -= 1
            stream.publish(at_s, removed(at_s, [asked.keys[held[number]]]), rng)
        elif held[number] < 6:
            stream.publish(at_s, stored(at_s, asked, (held[number], 1, 0)), rng)
            held[number] += 1
        stream.deliver(at_s)
    while stream.under_way[-1].arrives_s is None:  # only what comes after it tells of a lost frame
        stream.publish(30.0, removed(30.0, [1]), rng)
    stream.deliver(100.0)
    assert stream.stale is None
    for number, asked in enumerate(requests):
        rows = indexer.match(Query(asked.prompt, MODEL)).streams
        assert [row.matched_blocks for row in rows] == [held[number]]
