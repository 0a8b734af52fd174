"""Engines that an endpoints file names are subscribed to, and left when the file names them no more."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from kvatlas.config import Config, EngineSettings, IngestSettings, KeySettings, Seconds, ZmqSettings
from kvatlas.discovery.file import FileDiscovery
from kvatlas.indexer import Indexer
from kvatlas.ingest.publisher import EventPublisher
from tests.integration.engines import until
from tests.models.engine import ModelEngine
from tests.models.following import beside, write_at_once

PROMPT = [7] * 13


def indexing(**ingest: object) -> Indexer:
    settings = IngestSettings(**{"audit_interval": Seconds(0.2), **ingest})
    zmq = ZmqSettings(bind=False, reconnect_min=Seconds(0.01), reconnect_max=Seconds(0.05))
    return Indexer(Config(keys=KeySettings(block_size=4), zmq=zmq, ingest=settings))


def describe(file: Path, *publishers: EventPublisher) -> None:
    entries = [
        {
            "name": f"worker-{place}",
            "address": "127.0.0.1",
            "port": 8000 + place,
            "kvEvents": {"endpoint": publisher.endpoint, "replayEndpoint": publisher.replay_endpoint},
        }
        for place, publisher in enumerate(publishers)
    ]
    write_at_once(file, json.dumps({"endpoints": entries}))


@asynccontextmanager
async def engine_that_served(prompt: list[int]) -> AsyncIterator[EventPublisher]:
    """Publish on free ports; the events are there for replay."""
    model = ModelEngine()
    model.request(prompt)
    async with EventPublisher("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", topic="kv@whatever@m") as publisher:
        for frame in model.frames:
            await publisher.publish_frame(frame.topic.encode(), frame.seq, frame.payload)
        yield publisher


def following(file: Path, indexer: Indexer) -> AbstractAsyncContextManager[None]:
    discovery = FileDiscovery(file, interval_s=0.01, subscribe=indexer.follow)
    return beside(discovery.run(lambda _endpoints: None))


def pods(indexer: Indexer) -> dict[str, str]:
    return {pod.pod: pod.state for pod in indexer.pods()}


async def test_workers_of_a_file_are_known_by_their_endpoints_names_and_come_and_go_with_it(tmp_path: Path) -> None:
    file = tmp_path / "endpoints.json"
    async with engine_that_served(PROMPT) as first, engine_that_served(PROMPT) as second:
        describe(file, first)
        with indexing(gone_after=Seconds(0.2)) as indexer:
            async with following(file, indexer):
                await until(lambda: pods(indexer) == {"127.0.0.1:8000": "fresh"})
                describe(file, first, second)
                await until(lambda: pods(indexer) == {"127.0.0.1:8000": "fresh", "127.0.0.1:8001": "fresh"})
                describe(file)
                await until(lambda: pods(indexer) == {})
                assert indexer.stats().entries == 0


async def test_an_engine_given_before_the_start_is_followed_from_then_on() -> None:
    async with engine_that_served(PROMPT) as publisher:
        indexer = indexing()
        indexer.follow([EngineSettings(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint, pod="a")])
        with indexer:
            await until(lambda: pods(indexer) == {"a": "fresh"})


async def test_an_address_that_is_none_costs_that_engine_only() -> None:
    async with engine_that_served(PROMPT) as publisher:
        good = EngineSettings(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint, pod="a")
        with indexing() as indexer:
            indexer.follow([EngineSettings(endpoint="tcp://*:5557", pod="b"), good])
            await until(lambda: pods(indexer).get("a") == "fresh")
            assert indexer.ready()[0]
            assert 'kv_cache_source_connections_total{event="failed",source="tcp://*:5557"} 1.0' in (
                indexer.metrics.render().decode()
            )
