"""The write path over real sockets: engines that connect, engines that are connected to, ranks, restarts, losses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio

from kvatlas.config import Config, EngineSettings, IngestSettings, KeySettings, Seconds, ZmqSettings
from kvatlas.errors import SourceError
from kvatlas.indexer import Indexer
from kvatlas.ingest.publisher import EventPublisher
from kvatlas.results import PodStatus, Query
from kvatlas.types import Frame
from tests.models.engine import ModelEngine

KEYS = KeySettings(block_size=4)
PROMPT = [7] * 13


def watching(*engines: EngineSettings, **ingest: object) -> Indexer:
    zmq_settings = ZmqSettings(engines=engines, reconnect_min=Seconds(0.01), reconnect_max=Seconds(0.05))
    settings = IngestSettings(**{"audit_interval": Seconds(0), **ingest})
    return Indexer(Config(keys=KEYS, zmq=zmq_settings, ingest=settings))


@asynccontextmanager
async def published(engine: ModelEngine, endpoint: str = "tcp://127.0.0.1:0", replay: str | None = "tcp://127.0.0.1:0"):
    topic = f"kv@{engine.pod}@{engine.model}"
    async with EventPublisher(endpoint, replay, topic=topic) as publisher:
        yield publisher


async def publish(publisher: EventPublisher, engine: ModelEngine, *prompts: list[int]) -> None:
    """Let an engine serve prompts, and publish what it says."""
    before = len(engine.frames)
    for prompt in prompts:
        engine.request(prompt)
    for frame in engine.frames[before:]:
        await publisher.publish_frame(frame.topic.encode(), frame.seq, frame.payload)


def lose(publisher: EventPublisher, frame: Frame) -> None:
    """Keep a frame for replay, as an engine does, without that it reaches anybody."""
    publisher._kept.append((frame.topic.encode(), frame.seq, frame.payload))


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition not reached in time"
        await asyncio.sleep(0.01)


def only_pod(indexer: Indexer) -> PodStatus | None:
    pods = indexer.pods()
    return pods[0] if len(pods) == 1 and pods[0].state != "connecting" else None


def fresh(indexer: Indexer, blocks: int | None = None) -> bool:
    pod = only_pod(indexer)
    return pod is not None and pod.state == "fresh" and (blocks is None or pod.blocks == blocks)


def stale_as(indexer: Indexer) -> str | None:
    pod = only_pod(indexer)
    return pod.stale_reason.value if pod is not None and pod.stale_reason is not None else None


def predicted(indexer: Indexer, prompt: list[int] = PROMPT) -> int:
    pods = indexer.score(Query(prompt, "m")).pods
    return pods[0].predicted_cached_tokens if pods else 0


async def test_events_of_an_engine_that_is_connected_to_arrive() -> None:
    engine = ModelEngine()
    async with published(engine) as publisher:
        with watching(EngineSettings(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint)) as indexer:
            assert indexer.pods()[0].state == "connecting"
            await publisher.wait_for_subscriber()
            await publish(publisher, engine, PROMPT)
            await until(lambda: fresh(indexer, 3))
            assert predicted(indexer) == engine.cached_tokens(PROMPT) == 12
            assert only_pod(indexer).pod == engine.pod
            assert only_pod(indexer).model == "m"


async def test_what_was_published_before_is_replayed_on_connecting() -> None:
    engine = ModelEngine()
    async with published(engine) as publisher:
        await publish(publisher, engine, PROMPT, [8] * 9)
        with watching(EngineSettings(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint)) as indexer:
            await until(lambda: fresh(indexer, 5))
            assert predicted(indexer) == 12


async def test_without_replay_a_stream_joined_late_is_marked_incomplete() -> None:
    engine = ModelEngine()
    async with published(engine, replay=None) as publisher:
        await publish(publisher, engine, PROMPT)
        with watching(EngineSettings(endpoint=publisher.endpoint)) as indexer:
            await publisher.wait_for_subscriber()
            await publish(publisher, engine, [8] * 9)
            await until(lambda: stale_as(indexer) == "history_incomplete")
            assert indexer.score(Query([8] * 9, "m")).pods[0].stale


async def test_a_lost_frame_is_replayed() -> None:
    engine = ModelEngine()
    async with published(engine) as publisher:
        with watching(EngineSettings(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint)) as indexer:
            await publisher.wait_for_subscriber()
            await publish(publisher, engine, PROMPT)
            await until(lambda: fresh(indexer, 3))
            assert await asyncio.to_thread(indexer.sync)  # the check on connecting is over
            engine.request([8] * 9)
            lose(publisher, engine.frames[1])
            await publish(publisher, engine, [9] * 9)
            await until(lambda: fresh(indexer, 7))
            assert only_pod(indexer).gaps == 1
            assert predicted(indexer, [8] * 9) == 8


async def test_a_frame_lost_at_the_end_is_found_by_the_audit() -> None:
    engine = ModelEngine()
    async with published(engine) as publisher:
        settings = EngineSettings(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint)
        with watching(settings, audit_interval=Seconds(0.2)) as indexer:
            await publisher.wait_for_subscriber()
            await publish(publisher, engine, PROMPT)
            await until(lambda: fresh(indexer, 3))
            engine.request([8] * 9)
            lose(publisher, engine.frames[1])
            await until(lambda: fresh(indexer, 5))


@pytest.mark.parametrize("audit_s", [0.1, 0.0])
async def test_a_new_engine_whose_first_frame_is_lost_is_found_by_asking(audit_s: float) -> None:
    engine = ModelEngine()
    async with published(engine) as publisher:
        settings = EngineSettings(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint)
        with watching(settings, audit_interval=Seconds(audit_s)) as indexer:
            await publisher.wait_for_subscriber()
            await until(lambda: publisher.replays_served > 0)
            engine.request(PROMPT)
            lose(publisher, engine.frames[0])
            if not audit_s:
                assert await asyncio.to_thread(indexer.sync)
            await until(lambda: fresh(indexer, 3))


async def test_a_restarted_engine_is_known_by_its_replay_and_its_old_blocks_are_gone() -> None:
    engine = ModelEngine()
    async with published(engine) as publisher:
        endpoint, replay = publisher.endpoint, publisher.replay_endpoint
        await publish(publisher, engine, PROMPT, [8] * 9)
        indexer = watching(EngineSettings(endpoint=endpoint, replay_endpoint=replay))
        indexer.start()
        await until(lambda: fresh(indexer, 5))
    try:
        await until(lambda: stale_as(indexer) == "disconnected")
        engine.restart()
        async with published(engine, endpoint, replay) as publisher:
            await publish(publisher, engine, [9] * 9)
            await until(lambda: fresh(indexer, 2))
            assert only_pod(indexer).restarts == 1
            assert (predicted(indexer), predicted(indexer, [9] * 9)) == (0, 8)
    finally:
        indexer.close()


async def test_a_pod_that_stays_away_is_dropped() -> None:
    engine = ModelEngine()
    async with published(engine) as publisher:
        await publish(publisher, engine, PROMPT)
        settings = EngineSettings(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint)
        indexer = watching(settings, gone_after=Seconds(0.3))
        indexer.start()
        await until(lambda: fresh(indexer, 3))
    try:
        await until(lambda: indexer.stats().streams == 0)
        assert indexer.stats().entries == 0
        assert indexer.pods()[0].state == "connecting"
    finally:
        indexer.close()


async def test_engines_connect_to_a_bound_address_and_each_ranks_stream_is_its_own() -> None:
    ranks = [ModelEngine(), ModelEngine()]
    settings = ZmqSettings(endpoint="tcp://127.0.0.1:0")
    with Indexer(Config(keys=KEYS, zmq=settings, ingest=IngestSettings(audit_interval=Seconds(0)))) as indexer:
        async with connected_publisher(indexer.event_endpoint) as send:
            ranks[0].request(PROMPT)
            ranks[1].request(PROMPT[:9])
            for rank, engine in enumerate(ranks):
                for frame in engine.frames:
                    await send(frame, rank)
            await until(lambda: len(indexer.pods()) == 2)
            await until(lambda: indexer.stats().entries == 5)
            pod = indexer.score(Query(PROMPT, "m")).pods[0]
            assert pod.predicted_by_rank == {0: 12, 1: 8}
            assert (pod.dp_rank, pod.predicted_cached_tokens) == (0, 12)


@asynccontextmanager
async def connected_publisher(endpoint: str) -> AsyncIterator[Callable[[Frame, int], Awaitable[None]]]:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PUB)
    socket.connect(endpoint)
    await asyncio.sleep(0.2)  # nothing tells a publisher that connects when it has its subscriptions

    async def send(frame: Frame, rank: int) -> None:
        payload = frame.payload[:-1] + bytes([rank])  # the rank is the batch's last element, a small integer
        await socket.send_multipart([frame.topic.encode(), frame.seq.to_bytes(8, "big"), payload])

    try:
        yield send
    finally:
        context.destroy(linger=0)


async def test_an_engine_that_connected_and_went_is_stale_then_dropped() -> None:
    engine = ModelEngine()
    engine.request(PROMPT)
    config = Config(keys=KEYS, zmq=ZmqSettings(endpoint="tcp://127.0.0.1:0"), ingest=IngestSettings(gone_after=Seconds(0.5)))
    with Indexer(config) as indexer:
        async with connected_publisher(indexer.event_endpoint) as send:
            await send(engine.frames[0], 0)
            await until(lambda: fresh(indexer, 3))
        await until(lambda: stale_as(indexer) == "disconnected")
        await until(lambda: indexer.stats().streams == 0)


async def test_an_engine_that_connects_again_without_replay_stays_stale_until_it_empties_its_cache() -> None:
    engine = ModelEngine()
    engine.request(PROMPT)
    with Indexer(Config(keys=KEYS, zmq=ZmqSettings(endpoint="tcp://127.0.0.1:0"))) as indexer:
        async with connected_publisher(indexer.event_endpoint) as send:
            await send(engine.frames[0], 0)
            await until(lambda: fresh(indexer, 3))
        await until(lambda: stale_as(indexer) == "disconnected")
        async with connected_publisher(indexer.event_endpoint) as send:
            engine.request([8] * 9)
            await send(engine.frames[1], 0)
            await until(lambda: only_pod(indexer).blocks == 5)
            assert stale_as(indexer) == "disconnected"
            engine.reset()
            engine.request([9] * 9)
            await send(engine.frames[2], 0)
            await until(lambda: fresh(indexer, 2))


async def test_a_stream_whose_replay_hangs_holds_up_no_other() -> None:
    slow, quick = ModelEngine(pod="10.0.0.1:8000"), ModelEngine(pod="10.0.0.2:8000")
    context = zmq.asyncio.Context()
    silent = context.socket(zmq.ROUTER)  # takes replay requests and never answers
    port = silent.bind_to_random_port("tcp://127.0.0.1")
    try:
        async with published(slow, replay=None) as first, published(quick) as second:
            engines = (
                EngineSettings(endpoint=first.endpoint, replay_endpoint=f"tcp://127.0.0.1:{port}"),
                EngineSettings(endpoint=second.endpoint, replay_endpoint=second.replay_endpoint),
            )
            with watching(*engines, replay_timeout=Seconds(30)) as indexer:
                await first.wait_for_subscriber()
                await second.wait_for_subscriber()
                slow.request(PROMPT)
                slow.request([8] * 9)
                await first.publish_frame(slow.frames[1].topic.encode(), 1, slow.frames[1].payload)
                await publish(second, quick, PROMPT, [8] * 9)
                states = {}

                def both_seen() -> bool:
                    states.update({pod.pod: pod for pod in indexer.pods()})
                    return quick.pod in states and states[quick.pod].blocks == 5

                await until(both_seen, timeout_s=5)
                assert states[quick.pod].state == "fresh"
                assert states[slow.pod].stale_reason.value == "resyncing"
                assert indexer.ready()[0] is False
    finally:
        context.destroy(linger=0)


@asynccontextmanager
async def silent_replay_endpoint() -> AsyncIterator[str]:
    """An endpoint that takes requests and never answers."""
    context = zmq.asyncio.Context()
    router = context.socket(zmq.ROUTER)
    try:
        yield f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
    finally:
        context.destroy(linger=0)


async def test_live_frames_do_not_wait_for_an_audit_that_gets_no_answer() -> None:
    engine = ModelEngine(capacity=1000)
    async with published(engine, replay=None) as publisher, silent_replay_endpoint() as silent:
        settings = EngineSettings(endpoint=publisher.endpoint, replay_endpoint=silent)
        with watching(settings, audit_interval=Seconds(0.1), replay_timeout=Seconds(60)) as indexer:
            await publisher.wait_for_subscriber()
            for i in range(20):
                await publish(publisher, engine, [i] * 9)
                await until(lambda i=i: fresh(indexer, 2 * (i + 1)), timeout_s=5)
                await asyncio.sleep(0.02)


async def test_a_gap_shows_at_once_and_an_endpoint_that_never_answers_holds_nothing_up_for_long() -> None:
    engine = ModelEngine(capacity=1000)
    async with published(engine, replay=None) as publisher, silent_replay_endpoint() as silent:
        settings = EngineSettings(endpoint=publisher.endpoint, replay_endpoint=silent)
        with watching(settings, replay_timeout=Seconds(2)) as indexer:
            await publisher.wait_for_subscriber()
            await publish(publisher, engine, PROMPT)
            await until(lambda: fresh(indexer, 3))
            engine.request([8] * 9)
            await publish(publisher, engine, [9] * 9)
            await until(lambda: stale_as(indexer) == "resyncing", timeout_s=1.8)
            await until(lambda: stale_as(indexer) == "gap")
            assert only_pod(indexer).replay_answers is False
            assert indexer.ready() == (True, "ok")
            for i in range(10):  # the next gaps don't wait for it again
                engine.request([20 + i] * 9)
                await publish(publisher, engine, [40 + i] * 9)
            await until(lambda: only_pod(indexer).next_seq == len(engine.frames), timeout_s=1.8)


async def test_a_stream_stays_stale_where_every_replay_lacks_a_frame() -> None:
    engine = ModelEngine(capacity=1000)
    async with published(engine) as publisher:
        settings = EngineSettings(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint)
        with watching(settings, audit_interval=Seconds(0.1), replay_timeout=Seconds(0.5)) as indexer:
            await publisher.wait_for_subscriber()
            await publish(publisher, engine, PROMPT)
            await until(lambda: fresh(indexer, 3))
            engine.request([8] * 9)  # neither published nor kept
            await publish(publisher, engine, [9] * 9)
            await until(lambda: stale_as(indexer) == "gap")
            await until(lambda: only_pod(indexer).next_seq == 1, timeout_s=60)  # an audit began anew, and got no further
            await until(lambda: stale_as(indexer) == "gap")
            assert "is missing in the replay" in (only_pod(indexer).replay_problem or "")


async def test_a_full_queue_is_kept_where_replay_fails() -> None:
    engine = ModelEngine(capacity=10_000)
    async with published(engine, replay=None) as publisher, silent_replay_endpoint() as silent:
        settings = EngineSettings(endpoint=publisher.endpoint, replay_endpoint=silent)
        with watching(settings, queue_frames=50, replay_timeout=Seconds(0.2)) as indexer:
            await publisher.wait_for_subscriber()
            await publish(publisher, engine, *([i] * 9 for i in range(1, 300)))
            await until(lambda: only_pod(indexer) is not None and only_pod(indexer).queue_depth == 0)
            assert only_pod(indexer).blocks >= 100


async def test_ranks_are_connected_to_on_consecutive_ports() -> None:
    ranks = [ModelEngine(), ModelEngine()]
    async with published(ranks[0]) as first:
        address, _, port = first.endpoint.rpartition(":")
        replay_address, _, replay_port = first.replay_endpoint.rpartition(":")
        second_endpoints = (f"{address}:{int(port) + 1}", f"{replay_address}:{int(replay_port) + 1}")
        async with published(ranks[1], *second_endpoints) as second:
            settings = EngineSettings(endpoint=first.endpoint, replay_endpoint=first.replay_endpoint, dp_ranks=2)
            for publisher, engine in ((first, ranks[0]), (second, ranks[1])):
                engine.request(PROMPT)
                frame = engine.frames[0]
                rank = 0 if publisher is first else 1
                await publisher.publish_frame(frame.topic.encode(), 0, frame.payload[:-1] + bytes([rank]))
            with watching(settings) as indexer:
                states = [(0, "fresh"), (1, "fresh")]
                await until(lambda: [(pod.dp_rank, pod.state) for pod in indexer.pods()] == states)
                assert indexer.stats().entries == 6


async def test_messages_that_are_no_frames_change_nothing() -> None:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    engine = ModelEngine()
    engine.request(PROMPT)
    try:
        with watching(EngineSettings(endpoint=f"tcp://127.0.0.1:{port}")) as indexer:
            good = [b"kv@10.0.0.1:8000@m", (0).to_bytes(8, "big"), engine.frames[0].payload]
            await asyncio.sleep(0.3)
            for parts in (
                [b""],
                [b"kv@a@m", b"short", b""],
                [b"a", b"b", b"c", b"d", b"e"],
                [b"\xff\xfe", good[1], b"\xc1"],
                good,
            ):
                await socket.send_multipart(parts)
            await until(lambda: indexer.stats().entries == 3)
            rendered = indexer.metrics.render().decode()
            assert 'reason="not_a_frame"' in rendered
    finally:
        context.destroy(linger=0)


def test_an_address_that_is_taken_is_a_clear_error() -> None:
    with Indexer(Config(zmq=ZmqSettings(endpoint="tcp://127.0.0.1:0"))) as first:
        second = Indexer(Config(zmq=ZmqSettings(endpoint=first.event_endpoint)))
        with pytest.raises(SourceError, match=r"in use.*zmq\.endpoint"):
            second.start()
        assert second.ready()[0] is False
        second.close()


async def test_an_overflowing_queue_makes_the_stream_stale_until_a_replay_has_brought_everything() -> None:
    engine = ModelEngine(capacity=10_000)
    async with published(engine) as publisher:
        settings = EngineSettings(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint)
        with watching(settings, queue_frames=3) as indexer:
            await publisher.wait_for_subscriber()
            await publish(publisher, engine, *([i] * 9 for i in range(1, 400)))
            await until(lambda: fresh(indexer, 2 * 399), timeout_s=30)
            assert only_pod(indexer).next_seq == 399
            assert 'kv_cache_frames_total{outcome="dropped"' in indexer.metrics.render().decode()
