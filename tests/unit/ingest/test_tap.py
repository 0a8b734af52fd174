"""Listening to engines beside others, and publishing captures again."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from kvatlas.errors import RequestError, SourceError
from kvatlas.ingest.playback import Pace, play, playback_ports
from kvatlas.ingest.publisher import EventPublisher
from kvatlas.ingest.recording import RecordingWriter
from kvatlas.ingest.tap import Heard, Tap, TapLimits, TappedEngine
from kvatlas.types import Frame
from tests.models.ports import free_port

TOPIC = "kv@pod@model"


class Heap:
    """All frames that a tap handed on."""

    def __init__(self) -> None:
        self.frames: list[tuple[int | None, bool]] = []

    def __call__(self, heard: Heard, frame: Frame, live: bool) -> None:
        self.frames.append((frame.seq, live))


async def test_kept_frames_come_first_then_live_ones_each_once() -> None:
    heap = Heap()
    async with EventPublisher(replay_endpoint="tcp://127.0.0.1:0", topic=TOPIC) as engine:
        for _ in range(3):
            await engine.publish(b"before")
        tap = Tap([TappedEngine(engine.endpoint, engine.replay_endpoint)], heap, limits=TapLimits(frames_max=5))
        running = asyncio.create_task(tap.run())
        await engine.wait_for_subscriber()
        await engine.publish(b"meanwhile")
        await asyncio.sleep(0.4)
        await engine.publish(b"later")
        (heard,) = await asyncio.wait_for(running, 10)
    assert [seq for seq, _ in heap.frames] == [0, 1, 2, 3, 4]
    assert heap.frames[:3] == [(0, False), (1, False), (2, False)]
    assert heap.frames[4] == (4, True)
    assert (heard.connected, heard.replay_answered, heard.kept_frames + heard.live_frames) == (True, True, 5)


async def test_a_silent_replay_port_does_not_cost_the_live_frames() -> None:
    heap = Heap()
    async with EventPublisher(topic=TOPIC) as engine:
        tapped = TappedEngine(engine.endpoint, "tcp://127.0.0.1:1")
        tap = Tap([tapped], heap, limits=TapLimits(frames_max=2, replay_timeout_s=0.3))
        running = asyncio.create_task(tap.run())
        await engine.wait_for_subscriber()
        await engine.publish(b"a")
        await engine.publish(b"b")
        (heard,) = await asyncio.wait_for(running, 10)
    assert heap.frames == [(0, True), (1, True)]
    assert (heard.replay_answered, heard.live_frames) == (False, 2)


async def test_a_tap_ends_after_its_duration_and_counts_what_it_handed_on() -> None:
    heap = Heap()
    async with EventPublisher(topic=TOPIC) as engine:
        nothing_there = TappedEngine("tcp://127.0.0.1:1")
        tap = Tap([TappedEngine(engine.endpoint), nothing_there], heap, limits=TapLimits(duration_s=0.5, frames_max=3))
        running = asyncio.create_task(tap.run())
        await engine.wait_for_subscriber()
        for _ in range(10):
            await engine.publish(b"x")
        heard = await asyncio.wait_for(running, 10)
    assert len(heap.frames) == 3
    assert [(one.connected, one.live_frames) for one in heard] == [(True, 3), (False, 0)]


async def test_only_topics_with_the_prefix_are_taken() -> None:
    heap = Heap()
    async with EventPublisher(topic=TOPIC) as engine:
        tap = Tap([TappedEngine(engine.endpoint)], heap, topic_filter="kv@", limits=TapLimits(frames_max=1))
        running = asyncio.create_task(tap.run())
        await engine.wait_for_subscriber()
        await engine.publish_frame(b"other", 0, b"x")
        await engine.publish_frame(b"kv@pod", 1, b"x")
        await asyncio.wait_for(running, 10)
    assert heap.frames == [(1, True)]


async def test_what_is_no_address_is_refused() -> None:
    for engine in (TappedEngine("10.0.0.7"), TappedEngine("tcp://10.0.0.7:5557", "5607")):
        with pytest.raises(SourceError, match="is no address"):
            await Tap([engine], Heap(), limits=TapLimits(duration_s=1)).run()


def test_each_file_has_a_port_and_a_replay_port() -> None:
    ports = playback_ports([Path("a"), Path("b")], "tcp://127.0.0.1:5557", None)
    assert [(port.endpoint, port.replay_endpoint) for port in ports] == [
        ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5607"),
        ("tcp://127.0.0.1:5558", "tcp://127.0.0.1:5608"),
    ]
    (port,) = playback_ports([Path("a")], "tcp://*:5557", "tcp://*:7000")
    assert port.replay_endpoint == "tcp://*:7000"


@pytest.mark.parametrize(
    ("endpoint", "replay"),
    [
        ("127.0.0.1:5557", None),
        ("tcp://a:65500", None),
        ("tcp://a:0", None),
        ("tcp://a:5557", "tcp://a:5558"),
        ("tcp://a:1", "b"),
    ],
)
def test_addresses_without_room_for_all_files_are_refused(endpoint: str, replay: str | None) -> None:
    with pytest.raises(RequestError, match="--"):
        playback_ports([Path("a"), Path("b")], endpoint, replay)


def capture(path: Path, *received_s: float) -> Path:
    with RecordingWriter(path) as writer:
        for seq, at_s in enumerate(received_s):
            writer.append_frame(Frame(TOPIC, seq, b"x", int(at_s * 1e9)))
    return path


@pytest.mark.parametrize(
    ("pace", "least_s", "most_s"),
    [
        (Pace(speed=300, subscriber_timeout_s=0, linger_s=0), 0.3, 90.0),
        (Pace(speed=0, subscriber_timeout_s=0, linger_s=0), 0.0, 30.0),
        (Pace(speed=10, align=True, subscriber_timeout_s=0, linger_s=0), 3.0, 9.0),
    ],
    ids=["as recorded", "at once", "aligned"],
)
async def test_files_are_published_at_their_pace(tmp_path: Path, pace: Pace, least_s: float, most_s: float) -> None:
    files = [capture(tmp_path / "a", 100.0, 130.0), capture(tmp_path / "b", 160.0, 190.0)]
    ports = playback_ports(files, f"tcp://127.0.0.1:{free_port()}", None)
    counts: list[int] = []
    began_s = time.monotonic()
    published = await play(ports, pace, stop=asyncio.Event(), published=counts.append)
    assert (published, counts) == (4, [1, 2, 3, 4])
    assert least_s <= time.monotonic() - began_s < most_s


async def test_playing_stops_when_it_is_told_to(tmp_path: Path) -> None:
    ports = playback_ports([capture(tmp_path / "a", 0.0, 3600.0)], f"tcp://127.0.0.1:{free_port()}", None)
    stop = asyncio.Event()
    playing = asyncio.create_task(play(ports, Pace(subscriber_timeout_s=0, linger_s=None), stop=stop))
    await asyncio.sleep(0.2)
    stop.set()
    assert await asyncio.wait_for(playing, 2) == 1


async def test_playing_without_a_subscriber_is_refused_in_the_end(tmp_path: Path) -> None:
    ports = playback_ports([capture(tmp_path / "a", 0.0)], f"tcp://127.0.0.1:{free_port()}", None)
    waited_for: list[str] = []
    with pytest.raises(SourceError, match="0 of 1 subscribers"):
        await play(ports, Pace(subscriber_timeout_s=0.2), stop=asyncio.Event(), waiting=waited_for.append)
    assert waited_for == [ports[0].endpoint]
