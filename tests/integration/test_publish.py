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
