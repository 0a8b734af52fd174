"""The event port over real sockets on free loopback ports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio

from kvatlas.errors import SourceError
from kvatlas.ingest.publisher import EventPublisher

REPLAY = "tcp://127.0.0.1:0"
MARKER = [b"", b"", b"\xff" * 8, b""]


def seq(number: int) -> bytes:
    return number.to_bytes(8, "big")


@asynccontextmanager
async def connected(kind: int, endpoint: str | None, topic: bytes = b"") -> AsyncIterator[zmq.asyncio.Socket]:
    assert endpoint is not None
    context = zmq.asyncio.Context()
    socket = context.socket(kind)
    socket.set(zmq.RCVTIMEO, 5000)
    if kind == zmq.SUB:
        socket.subscribe(topic)
    socket.connect(endpoint)
    try:
        yield socket
    finally:
        socket.close(linger=0)
        context.term()


async def replay(socket: zmq.asyncio.Socket, start: int) -> list[list[bytes]]:
    """Ask and return the answers up to the marker."""
    await socket.send_multipart([b"", seq(start)])
    answers = []
    while (answer := await socket.recv_multipart())[-2:] != [b"\xff" * 8, b""]:
        answers.append(answer)
    return [*answers, answer]


async def test_a_subscriber_gets_every_frame_from_the_first_on() -> None:
    async with EventPublisher(topic="kv@a") as publisher, connected(zmq.SUB, publisher.endpoint) as subscriber:
        await publisher.wait_for_subscriber(5)
        assert [await publisher.publish(bytes([i])) for i in range(3)] == [0, 1, 2]
        assert [await subscriber.recv_multipart() for _ in range(3)] == [[b"kv@a", seq(i), bytes([i])] for i in range(3)]


async def test_port_0_is_a_free_port_of_loopback() -> None:
    async with EventPublisher(replay_endpoint=REPLAY) as one, EventPublisher(replay_endpoint=REPLAY) as two:
        endpoints = {one.endpoint, one.replay_endpoint, two.endpoint, two.replay_endpoint}
        assert len(endpoints) == 4
        assert all(endpoint and endpoint.startswith("tcp://127.0.0.1:") for endpoint in endpoints)


async def test_an_address_in_use_is_an_error_that_names_it() -> None:
    async with EventPublisher() as first:
        with pytest.raises(SourceError) as caught:
            async with EventPublisher(replay_endpoint=first.endpoint):
                pass
        assert caught.value.endpoint == first.endpoint


async def test_a_replay_gives_all_kept_frames_from_the_asked_one_on_and_the_marker() -> None:
    async with (
        EventPublisher(replay_endpoint=REPLAY, topic="t") as publisher,
        connected(zmq.DEALER, publisher.replay_endpoint) as dealer,
    ):
        for i in range(5):
            await publisher.publish(bytes([i]))
        frames = [[b"", b"t", seq(i), bytes([i])] for i in range(5)]
        assert await replay(dealer, 0) == [*frames, MARKER]
        assert await replay(dealer, 3) == [*frames[3:], MARKER]
        assert await replay(dealer, 99) == [MARKER]
        assert publisher.replays_served == 3


async def test_only_the_newest_frames_are_kept() -> None:
    async with (
        EventPublisher(replay_endpoint=REPLAY, buffer_frames=2) as publisher,
        connected(zmq.DEALER, publisher.replay_endpoint) as dealer,
    ):
        for i in range(5):
            await publisher.publish(bytes([i]))
        assert [answer[2] for answer in await replay(dealer, 0)] == [seq(3), seq(4), b"\xff" * 8]


async def test_a_long_replay_arrives_whole_and_others_go_on_meanwhile() -> None:
    async with (
        EventPublisher(replay_endpoint=REPLAY, topic="t") as publisher,
        connected(zmq.SUB, publisher.endpoint, b"other") as subscriber,
        connected(zmq.DEALER, publisher.replay_endpoint) as dealer,
    ):
        for _ in range(5_000):
            await publisher.publish(b"x" * 100)
        await publisher.wait_for_subscriber(5)
        asked = asyncio.create_task(replay(dealer, 0))
        await publisher.publish_frame(b"other", 5_000, b"meanwhile")
        assert (await subscriber.recv_multipart())[2] == b"meanwhile"
        answers = await asked
        assert [answer[2] for answer in answers[:5_000]] == [seq(i) for i in range(5_000)]
        assert answers[-1] == MARKER


async def test_an_older_engines_replay_has_no_topics() -> None:
    async with (
        EventPublisher(replay_endpoint=REPLAY, topic="t", replay_topic=False) as publisher,
        connected(zmq.DEALER, publisher.replay_endpoint) as dealer,
    ):
        await publisher.publish(b"p")
        assert await replay(dealer, 0) == [[b"", seq(0), b"p"], [b"", b"\xff" * 8, b""]]


async def test_malformed_requests_are_counted_and_the_next_one_is_answered() -> None:
    async with (
        EventPublisher(replay_endpoint=REPLAY) as publisher,
        connected(zmq.DEALER, publisher.replay_endpoint) as dealer,
    ):
        for request in ([b""], [b"", b"7"], [b"", seq(0), b""], [b"x", seq(0)], [b""] * 9):
            await dealer.send_multipart(request)
        assert await replay(dealer, 0) == [MARKER]
        assert publisher.replay_requests_malformed == 5


async def test_a_given_number_is_kept_and_counted_on_from() -> None:
    async with EventPublisher() as publisher, connected(zmq.SUB, publisher.endpoint) as subscriber:
        await publisher.wait_for_subscriber(5)
        assert [await publisher.publish(b"", seq=7), await publisher.publish(b"")] == [7, 8]
        await publisher.publish_frame(b"other", 3, b"p")
        assert [(await subscriber.recv_multipart())[:2] for _ in range(3)] == [[b"", seq(7)], [b"", seq(8)], [b"other", seq(3)]]


async def test_waiting_counts_subscribers_that_come_and_go() -> None:
    async with EventPublisher() as publisher:
        with pytest.raises(SourceError, match="0 of 1 subscribers"):
            await publisher.wait_for_subscriber(0.05)
        async with connected(zmq.SUB, publisher.endpoint, b"t"), connected(zmq.SUB, publisher.endpoint, b"t"):
            await publisher.wait_for_subscriber(5, count=2)
        for _ in range(500):
            if not publisher.subscribers:
                break
            await asyncio.sleep(0.01)
        assert publisher.subscribers == 0


async def test_publishing_outside_of_the_block_is_refused() -> None:
    publisher = EventPublisher()
    with pytest.raises(SourceError, match="not open"):
        await publisher.publish(b"")
    async with publisher:
        pass
    with pytest.raises(SourceError, match="not open"):
        await publisher.publish(b"")


async def test_a_shared_context_outlives_the_publisher() -> None:
    context = zmq.asyncio.Context()
    for _ in range(2):
        async with EventPublisher(context=context) as publisher:
            await publisher.publish(b"")
    context.term()
