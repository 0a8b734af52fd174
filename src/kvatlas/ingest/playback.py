"""Captures published again over ZMQ, as the engines did: each file on a port of its own, with its replay port."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from kvatlas.errors import RequestError
from kvatlas.ingest.publisher import EventPublisher
from kvatlas.ingest.recording import read_frames
from kvatlas.types import Frame

REPLAY_PORT_OFFSET = 50

_TCP = re.compile(r"(tcp://\S+):([0-9]{1,5})")


class PlaybackPort(msgspec.Struct, frozen=True):
    """Where one file is published."""

    path: Path
    endpoint: str
    replay_endpoint: str


class Pace(msgspec.Struct, frozen=True):
    """How fast, and what is waited for."""

    speed: float = 1.0
    """Factor on the recorded pace; 0 publishes without waiting."""
    align: bool = False
    """Start all files at once, rather than as far apart as they were recorded."""
    subscriber_timeout_s: float = 60.0
    """How long to wait for a subscriber to each file before the first frame: what nobody hears is lost. 0: not at all."""
    linger_s: float | None = 2.0
    """How long the ports stay open after the last frame; None: until stopped."""


def playback_ports(paths: Sequence[Path], endpoint: str, replay_endpoint: str | None) -> list[PlaybackPort]:
    """Return the address of each file: file i at port + i (as data-parallel rank i), its replay at ``replay_endpoint``'s + i.

    By default the replay port is REPLAY_PORT_OFFSET above. RequestError where there is no room for that.
    """
    address, port = _split(endpoint, "--to")
    replay_address, replay_port = address, port + REPLAY_PORT_OFFSET
    if replay_endpoint is not None:
        replay_address, replay_port = _split(replay_endpoint, "--replay-endpoint")
    last = len(paths) - 1
    if max(port, replay_port) + last > 65535:
        raise RequestError("--to", f"needs ports up to {max(port, replay_port) + last} (with replay ports)", "use a lower one")
    if address == replay_address and abs(port - replay_port) <= last:
        raise RequestError("--replay-endpoint", f"its ports overlap those of {endpoint}", f"keep them {len(paths)} apart")
    return [PlaybackPort(path, f"{address}:{port + i}", f"{replay_address}:{replay_port + i}") for i, path in enumerate(paths)]


async def play(
    ports: Sequence[PlaybackPort],
    pace: Pace,
    *,
    stop: asyncio.Event,
    published: Callable[[int], None] = lambda count: None,
    waiting: Callable[[str], None] = lambda endpoint: None,
    tolerate_truncation: bool = False,
) -> int:
    """Publish all files beside each other, in order of receive time. Returns the frames published.

    ``published`` is called with the running count, ``waiting`` with an address that waits for its subscriber. Ends early when
    ``stop`` is set. SourceError for an address that cannot be bound, and where no subscriber comes.
    """
    async with AsyncExitStack() as stack:
        publishers = [await stack.enter_async_context(EventPublisher(port.endpoint, port.replay_endpoint)) for port in ports]
        if pace.subscriber_timeout_s > 0:
            for publisher in publishers:
                waiting(publisher.endpoint)
                if not await _subscribed(publisher, pace.subscriber_timeout_s, stop):
                    return 0
        count = 0
        async for publisher, frame in _paced(ports, publishers, pace, stop, tolerate_truncation):
            assert frame.seq is not None
            await publisher.publish_frame(frame.topic.encode(), frame.seq, frame.payload)
            count += 1
            published(count)
        await _stopped_within(pace.linger_s, stop)
        return count


async def _paced(
    ports: Sequence[PlaybackPort],
    publishers: Sequence[EventPublisher],
    pace: Pace,
    stop: asyncio.Event,
    tolerate_truncation: bool,
) -> AsyncIterator[tuple[EventPublisher, Frame]]:
    """Yield each frame when its time has come, until ``stop`` is set."""

    def frames_of(port: PlaybackPort, publisher: EventPublisher) -> Iterator[tuple[int, EventPublisher, Frame]]:
        first_ns: int | None = None
        for frame in read_frames(port.path, tolerate_truncation=tolerate_truncation):
            first_ns = frame.received_ns if first_ns is None else first_ns
            yield frame.received_ns - (first_ns if pace.align else 0), publisher, frame

    clock = asyncio.get_running_loop().time
    began_s, began_ns = clock(), None
    for at_ns, publisher, frame in heapq.merge(*map(frames_of, ports, publishers), key=lambda entry: entry[0]):
        began_ns = at_ns if began_ns is None else began_ns
        wait_s = began_s + (at_ns - began_ns) / 1e9 / pace.speed - clock() if pace.speed > 0 else 0.0
        if await _stopped_within(max(0.0, wait_s), stop):
            return
        yield publisher, frame


async def _stopped_within(seconds: float | None, stop: asyncio.Event) -> bool:
    """Wait for ``seconds`` (None: for ever), or less if ``stop`` is set; return whether it is."""
    if seconds == 0:
        await asyncio.sleep(0)
    else:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)
    return stop.is_set()


async def _subscribed(publisher: EventPublisher, timeout_s: float, stop: asyncio.Event) -> bool:
    """Wait for a subscriber; return whether one came before ``stop`` was set. SourceError after ``timeout_s``."""
    subscriber = asyncio.create_task(publisher.wait_for_subscriber(timeout_s))
    stopped = asyncio.create_task(stop.wait())
    done, late = await asyncio.wait((subscriber, stopped), return_when=asyncio.FIRST_COMPLETED)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    if subscriber in done:
        subscriber.result()
    return subscriber in done


def _split(endpoint: str, option: str) -> tuple[str, int]:
    """Return an address without its port, and the port."""
    found = _TCP.fullmatch(endpoint)
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise RequestError(option, f"{endpoint!r:.80} is no address with a port", 'use one such as "tcp://127.0.0.1:5557"')
    return found[1], int(found[2])
