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
    st.tuples(st.just("drop_next"), st.integers(1, 3)),
    st.tuples(st.just("repeat"), st.integers(1, 30)),
    st.tuples(st.just("swap_next_two"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("restart"), st.just(0)),
    st.tuples(st.just("reconnect"), st.just(0)),
    st.tuples(st.just("lose_in_replay"), st.integers(0, 20)),
    st.tuples(st.just("fail_replay"), st.just(0)),
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
            elif self.swap and self.held is None and self.history:
                # never a process's first frame: overtaken by its second one, it looks like the start of yet another process
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


class Run:
    """Takes the steps, and checks the promise after each."""

    def __init__(self, engine: ModelEngine, worker: StreamWorker, indexer: Indexer) -> None:
        self.engine = engine
        self.worker = worker
        self.indexer = indexer
        self.channel = Channel(engine, worker)
        self.unannounced = False
        """The engine was reset and has published nothing since."""

    async def follow(self, steps: list[tuple[str, int]]) -> None:
        for step, value in steps:
            await getattr(self, step)(value)
            self.channel.carry()
            await asyncio.wait_for(self.worker.settled(), 5)
            self.check_predictions()
        if self.worker.can_replay:
            await self.all_is_well_again()

    async def request(self, value: int) -> None:
        before = len(self.engine.frames)
        self.engine.request(PROMPTS[value])
        self.unannounced = self.unannounced and len(self.engine.frames) == before

    async def drop_next(self, value: int) -> None:
        self.channel.drop = value

    async def repeat(self, value: int) -> None:
        if self.channel.history:
            self.worker.offer(self.channel.history[-min(value, len(self.channel.history))])

    async def swap_next_two(self, value: int) -> None:
        self.channel.swap = True

    async def reset(self, value: int) -> None:
        self.engine.reset()
        self.unannounced = True

    async def restart(self, value: int) -> None:
        self.worker.link_down(0.0)
        self.channel.restart()
        self.channel.tail_lost = self.unannounced = False
        self.worker.link_up()

    async def reconnect(self, value: int) -> None:
        self.worker.link_down(0.0)
        self.worker.link_up()

    async def lose_in_replay(self, value: int) -> None:
        self.engine.replay_loses = {max(0, len(self.engine.frames) - 1 - value)}

    async def fail_replay(self, value: int) -> None:
        self.engine.replay_fails = 1

    async def check(self, value: int) -> None:
        self.channel.carry()
        if await asyncio.wait_for(self.worker.check(), 5):
            self.channel.tail_lost = False

    async def all_is_well_again(self) -> None:
        """Once the engine answers, the stream is exact, if the engine still keeps its whole history."""
        self.engine.replay_fails, self.engine.replay_loses = 0, set()
        for _ in range(2):
            assert await asyncio.wait_for(self.worker.check(), 5)
        self.channel.tail_lost = False
        if len(self.engine.frames) <= self.engine.replay_buffer_frames:
            assert self.worker.stale is None
        self.check_predictions()

    def check_predictions(self) -> None:
        if self.worker.stale is not None or self.unannounced or self.channel.tail_lost:
            return
        for prompt in PROMPTS:
            pods = self.indexer.score(Query(prompt, self.engine.model)).pods
            predicted = pods[0].predicted_cached_tokens if pods else 0
            assert predicted == self.engine.cached_tokens(prompt), prompt


async def run(steps: list[tuple[str, int]], *, replay: bool, buffer_frames: int, drop_when_stale: bool) -> None:
    engine = ModelEngine()
    engine.replay_buffer_frames = buffer_frames
    indexer = Indexer(Config(keys=KeySettings(block_size=engine.block_size)))
    metrics = Metrics()
    with ThreadPoolExecutor(1) as executor:
        worker = StreamWorker(
            Stream(PodId(engine.pod)),
            decoder=VllmDecoder(),
            applier=Applier(indexer.index, metrics),
            index=indexer.index,
            metrics=metrics,
            executor=executor,
            replayer=engine if replay else None,
            model_of=lambda frame: engine.model,
            limits=WorkerLimits(drop_when_stale=drop_when_stale, replay_trusted_frames=1, replay_backoff_s=0.0),
            source="test",
        )
        task = asyncio.create_task(worker.run())
        try:
            await Run(engine, worker, indexer).follow(steps)
        finally:
            task.cancel()


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
