"""The whole write path against an engine that keeps its own truth, over a channel that loses, repeats and reorders frames.

The promise under test: whenever a stream is settled and not marked stale, every prediction equals what the engine would report;
and it is marked stale whenever that is not so, from the first frame on that shows a loss.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.config import Config, KeySettings
from kvatlas.indexer import Indexer
from kvatlas.ingest.apply import Applier
from kvatlas.ingest.decode.header import peek_header
from kvatlas.ingest.decode.vllm import VllmDecoder
from kvatlas.ingest.worker import StreamWorker, WorkerLimits
from kvatlas.observe.metrics import Metrics
from kvatlas.results import Query
from kvatlas.types import Frame, PodId, Stream
from tests.models.engine import ModelEngine

PROMPTS = [[topic] * 8 + [user] * (4 + user) for topic in range(4) for user in range(1, 9)]

REQUEST = st.tuples(st.just("request"), st.integers(0, len(PROMPTS) - 1))
STEP = st.one_of(
    REQUEST,
    REQUEST,
    REQUEST,
    REQUEST,
    st.tuples(st.just("drop next"), st.integers(1, 3)),
    st.tuples(st.just("repeat"), st.integers(1, 30)),
    st.tuples(st.just("swap next two"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("restart"), st.just(0)),
    st.tuples(st.just("link down and up"), st.just(0)),
    st.tuples(st.just("replay loses"), st.integers(0, 20)),
    st.tuples(st.just("replay fails"), st.just(0)),
    st.tuples(st.just("check"), st.just(0)),
)


class Channel:
    """Carries an engine's frames to its worker, badly."""

    def __init__(self, engine: ModelEngine, worker: StreamWorker) -> None:
        self.engine = engine
        self.worker = worker
        self.sent = 0
        self.drop = 0
        self.swap = False
        self.held: Frame | None = None
        self.history: list[Frame] = []
        self.tail_lost = False
        """The engine's last frame did not arrive: nothing can show that yet."""

    def carry(self) -> None:
        for frame in self.engine.frames[self.sent :]:
            self.sent += 1
            if self.drop:
                self.drop -= 1
                self.tail_lost = True
            elif self.swap and self.held is None:
                self.held = frame
                self.tail_lost = True
            else:
                self.tail_lost = False
                self.deliver(frame)
                if self.held is not None:
                    self.deliver(self.held)
                    self.held, self.swap = None, False

    def deliver(self, frame: Frame) -> None:
        self.history.append(frame)
        self.worker.offer(frame)

    def restart(self) -> None:
        self.engine.restart()
        self.sent = 0
        self.held = None
        self.history.clear()  # what a connection carried comes before what the next one carries


async def run(steps: list[tuple[str, int]], *, replay: bool, buffer_frames: int, drop_when_stale: bool) -> None:
    engine = ModelEngine()
    engine.replay_buffer_frames = buffer_frames
    indexer = Indexer(Config(keys=KeySettings(block_size=engine.block_size)))
    metrics = Metrics()
    stream = Stream(PodId(engine.pod))
    with ThreadPoolExecutor(1) as executor:
        worker = StreamWorker(
            stream,
            model=engine.model,
            decoder=VllmDecoder(),
            applier=Applier(indexer.index, metrics),
            index=indexer.index,
            metrics=metrics,
            executor=executor,
            replayer=engine if replay else None,
            timestamp_of=lambda payload: peek_header(payload).timestamp_s,
            limits=WorkerLimits(drop_when_stale=drop_when_stale),
            source="test",
        )
        task = asyncio.create_task(worker.run())
        try:
            await _follow(steps, engine, Channel(engine, worker), worker, indexer)
        finally:
            task.cancel()


async def _follow(
    steps: list[tuple[str, int]], engine: ModelEngine, channel: Channel, worker: StreamWorker, indexer: Indexer
) -> None:
    unannounced = False
    """The engine has reset or restarted and published nothing since."""
    for step, value in steps:
        if step == "request":
            before = len(engine.frames)
            engine.request(PROMPTS[value])
            unannounced = unannounced and len(engine.frames) == before
        elif step == "drop next":
            channel.drop = value
        elif step == "repeat" and channel.history:
            worker.offer(channel.history[-min(value, len(channel.history))])
        elif step == "swap next two":
            channel.swap = True
        elif step == "reset":
            engine.reset()
            unannounced = True
        elif step == "restart":
            worker.link_down(0.0)
            channel.restart()
            channel.tail_lost = False
            worker.link_up()
            unannounced = False
        elif step == "link down and up":
            worker.link_down(0.0)
            worker.link_up()
        elif step == "replay loses":
            engine.replay_loses = {max(0, len(engine.frames) - 1 - value)}
        elif step == "replay fails":
            engine.replay_fails = 1
        channel.carry()
        if step == "check" and await asyncio.wait_for(worker.check(), 5):
            channel.tail_lost = False
        await asyncio.wait_for(worker.settled(), 5)
        if worker.stale is None and not unannounced and not channel.tail_lost:
            _check_predictions(engine, indexer)
    if worker.can_replay:  # once the engine answers, all is well again, if it still keeps its whole history
        engine.replay_fails, engine.replay_loses = 0, set()
        await asyncio.wait_for(worker.check(), 5)
        await asyncio.wait_for(worker.check(), 5)
        if len(engine.frames) <= engine.replay_buffer_frames:
            assert worker.stale is None
        if worker.stale is None and not unannounced:
            _check_predictions(engine, indexer)


def _check_predictions(engine: ModelEngine, indexer: Indexer) -> None:
    for prompt in PROMPTS:
        pods = indexer.score(Query(prompt, engine.model)).pods
        predicted = pods[0].predicted_cached_tokens if pods else 0
        assert predicted == engine.cached_tokens(prompt), prompt


@pytest.mark.parametrize("drop_when_stale", [False, True], ids=["keep", "drop"])
@pytest.mark.parametrize(
    ("replay", "buffer_frames"), [(True, 10_000), (True, 5), (False, 0)], ids=["replay", "short buffer", "no replay"]
)
@settings(max_examples=120, deadline=None)
@given(steps=st.lists(STEP, max_size=30))
def test_exact_whenever_not_stale(
    replay: bool, buffer_frames: int, drop_when_stale: bool, steps: list[tuple[str, int]]
) -> None:
    asyncio.run(run(steps, replay=replay, buffer_frames=buffer_frames, drop_when_stale=drop_when_stale))
