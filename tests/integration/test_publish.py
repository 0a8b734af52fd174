"""Frames from this process: in order, bounded, refused with a reason."""

from __future__ import annotations

import threading
import time
from array import array

import pytest

from kvatlas.config import Config, IngestSettings, KeySettings, Seconds, ZmqSettings
from kvatlas.errors import RequestError
from kvatlas.indexer import Indexer
from kvatlas.ingest.decode.generic import EventType, GenericEvent, encode_msgpack
from kvatlas.results import Query
from kvatlas.types import Frame, PodId
from tests.models.engine import ModelEngine

QUIET = ZmqSettings(bind=False)


def indexer_with(**ingest: object) -> Indexer:
    settings = IngestSettings(**{"audit_interval": Seconds(0), **ingest})
    return Indexer(Config(keys=KeySettings(block_size=4), zmq=QUIET, ingest=settings))


def test_frames_are_applied_in_order_and_seen_after_a_drain() -> None:
    engine = ModelEngine(capacity=1000)
    for i in range(200):
        engine.request([i] * 9)
    with indexer_with() as indexer:
        for frame in engine.frames:
            indexer.publish(frame)
        indexer.drain()
        assert indexer.stats().entries == 400
        assert indexer.pods()[0].state == "fresh"
        assert indexer.score(Query([7] * 9, "m")).pods[0].predicted_cached_tokens == 8


def test_pods_named_by_the_caller_come_before_the_topics() -> None:
    engine = ModelEngine()
    engine.request([1] * 9)
    with indexer_with() as indexer:
        indexer.publish(engine.frames[0], pod=PodId("mine"), model="other")
        indexer.drain()
        assert [(pod.pod, pod.model) for pod in indexer.pods()] == [("mine", "other")]


def test_a_full_queue_refuses_the_frame_and_loses_nothing() -> None:
    engine = ModelEngine(capacity=10_000)
    for i in range(500):
        engine.request([i] * 9)
    refused = 0
    with indexer_with(queue_frames=5) as indexer:
        for frame in engine.frames:
            while True:
                try:
                    indexer.publish(frame)
                    break
                except RequestError as error:
                    if error.field != "frame":
                        raise
                    refused += 1
                    time.sleep(0.001)
        indexer.drain()
        assert refused > 0
        assert indexer.stats().entries == 1000
        assert indexer.pods()[0].state == "fresh"


def test_threads_publish_their_pods_beside_each_other() -> None:
    engines = [ModelEngine(pod=f"10.0.0.{i}:8000", capacity=1000) for i in range(8)]
    for engine in engines:
        for i in range(50):
            engine.request([i] * 9)
    with indexer_with() as indexer:

        def send(engine: ModelEngine) -> None:
            for frame in engine.frames:
                indexer.publish(frame)

        threads = [threading.Thread(target=send, args=(engine,)) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        indexer.drain()
        assert {pod.state for pod in indexer.pods()} == {"fresh"}
        assert indexer.stats().entries == 8 * 100


def test_what_cannot_be_taken_is_refused_with_the_field_named() -> None:
    engine = ModelEngine()
    engine.request([1] * 9)
    nameless = Frame("", None, engine.frames[0].payload, 0)
    indexer = indexer_with(streams_max=1)
    with pytest.raises(RequestError, match="start"):
        indexer.publish(engine.frames[0])
    with indexer:
        with pytest.raises(RequestError, match="name it"):
            indexer.publish(nameless)
        indexer.publish(engine.frames[0])
        with pytest.raises(RequestError, match="one format"):
            indexer.publish(engine.frames[0], decoder="generic")
        with pytest.raises(RequestError, match="streamsMax"):
            indexer.publish(engine.frames[0], pod=PodId("another"))


def test_a_source_without_hashes_tells_whole_prefixes() -> None:
    event = GenericEvent(
        type=EventType.PREFIX_CACHED, pod_id="cache", prefix=array("I", range(12)), block_size_tokens=4, model="m"
    )
    with indexer_with() as indexer:
        indexer.publish(Frame("", None, encode_msgpack([event]), 0), decoder="generic", pod=PodId("cache"))
        indexer.drain()
        assert indexer.score(Query(list(range(13)), "m")).pods[0].predicted_cached_tokens == 12


def test_a_promise_counts_until_the_events_come() -> None:
    engine = ModelEngine()
    engine.request([1] * 9)
    with indexer_with() as indexer:
        indexer.publish(engine.frames[0])
        indexer.drain()
        stream = next(iter(indexer.index.streams()))
        indexer.promise(Query([5] * 9, "m"), stream)
        pod = indexer.score(Query([5] * 9, "m")).pods[0]
        assert (pod.predicted_cached_tokens, pod.speculative_blocks) == (8, 2)
        engine.request([5] * 9)
        indexer.publish(engine.frames[1])
        indexer.drain()
        pod = indexer.score(Query([5] * 9, "m")).pods[0]
        assert (pod.predicted_cached_tokens, pod.speculative_blocks) == (8, 0)


def test_only_pods_of_the_model_are_candidates() -> None:
    llama, qwen = ModelEngine(pod="10.0.0.1:8000", model="llama"), ModelEngine(pod="10.0.0.2:8000", model="qwen")
    with indexer_with() as indexer:
        for engine in (llama, qwen):
            engine.request([1] * 9)
            indexer.publish(engine.frames[0])
        indexer.drain()
        assert [pod.pod for pod in indexer.score(Query([1] * 9, "llama")).pods] == [llama.pod]
        assert [pod.pod for pod in indexer.score(Query([2] * 9, "qwen")).pods] == [qwen.pod]
        assert indexer.score(Query([1] * 9, "typo")).pods == ()


def test_a_pod_that_serves_another_model_now_holds_nothing_of_the_old_one() -> None:
    before, after = ModelEngine(model="llama"), ModelEngine(model="qwen")
    before.request([1] * 9)
    after.request([1] * 9)
    with indexer_with() as indexer:
        indexer.publish(before.frames[0])
        indexer.publish(after.frames[0])
        indexer.drain()
        assert indexer.score(Query([1] * 9, "llama")).pods == ()
        pod = indexer.score(Query([1] * 9, "qwen")).pods[0]
        assert (pod.predicted_cached_tokens, pod.stale) == (8, False)
        assert [(status.model, status.restarts) for status in indexer.pods()] == [("qwen", 1)]


def test_an_engine_that_restarts_after_long_is_no_repetition_whatever_its_clock_says() -> None:
    engine = ModelEngine(capacity=10)
    for i in range(1500):
        engine.request([i] * 9)
    with indexer_with() as indexer:
        for frame in engine.frames:
            indexer.publish(frame)
        engine.restart()
        engine.clock_s = 500.0  # a clock that was set back
        engine.request([5] * 9)
        indexer.publish(engine.frames[0])
        indexer.drain()
        status = indexer.pods()[0]
        assert (status.state, status.restarts, status.blocks) == ("fresh", 1, 2)
        assert indexer.score(Query([5] * 9, "m")).pods[0].predicted_cached_tokens == 8


def test_a_restart_that_no_link_event_told_of_is_exact_from_frame_0() -> None:
    engine = ModelEngine()
    for i in range(5):
        engine.request([i] * 9)
    with indexer_with() as indexer:
        for frame in engine.frames:
            indexer.publish(frame)
        for _ in range(2):
            engine.restart()
            engine.request([7] * 9)
            indexer.publish(engine.frames[0])
            indexer.drain()
            assert indexer.pods()[0].state == "fresh"
