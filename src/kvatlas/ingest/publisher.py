"""An engine's event port: what vLLM's ZMQ publisher does, for replays of captures, for engines of one's own, and for tests.

Protocol (vLLM 0.32 ``distributed/kv_events.py``): PUB sends ``[topic, seq, payload]``, seq a u64 big endian. To a request
``[b"", first seq]`` the replay port answers with ``[b"", topic, seq, payload]`` for each kept frame from there on, then with
the marker ``[b"", b"", ff x 8, b""]``. Older vLLM and SGLang answer without the topic.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio

from kvatlas.errors import SourceError

_SEQ = struct.Struct(">Q")
_END_SEQ = b"\xff" * 8

_REPLIES_PER_TURN = 256
"""Replay answers sent before other tasks get their turn."""


class EventPublisher:
    """Publishes frames and answers replay requests while its ``async with`` block lasts. Loopback unless told otherwise.

    A port of 0 takes a free one: see ``endpoint`` and ``replay_endpoint``. ``replay_endpoint`` None: no replay, as in vLLM by
    default. ``buffer_frames``: frames kept for replay, the oldest go first. ``high_water_mark``: frames that wait for a slow
    subscriber; beyond it frames are dropped, which it sees as a gap. ``replay_topic`` False: answer as older engines do.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:0",
        replay_endpoint: str | None = None,
        *,
        topic: str = "",
        buffer_frames: int = 10_000,
        high_water_mark: int = 100_000,
        replay_topic: bool = True,
        context: zmq.asyncio.Context | None = None,
    ) -> None:
        self.endpoint = endpoint
        """Where subscribers connect; the bound address once entered."""
        self.replay_endpoint = replay_endpoint
        """Where replay requests go; the bound address once entered."""
        self.next_seq = 0
        self.subscribers = 0
        """Subscriptions in force; a subscriber of two topics counts twice."""
        self.replays_served = 0
        self.replay_requests_malformed = 0
        """Requests that were not ``[b"", 8 bytes]``. They are not answered."""
        self._topic = topic.encode()
        self._kept: deque[tuple[bytes, int, bytes]] = deque(maxlen=buffer_frames)
        self._high_water_mark = high_water_mark
        self._replay_topic = replay_topic
        self._own_context = context is None
        self._context = context or zmq.asyncio.Context()
        self._publications: zmq.asyncio.Socket | None = None
        self._replays: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._subscribed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        """Bind. Raises SourceError if an address cannot be had."""
        try:
            # XPUB is PUB that tells who subscribes, which wait_for_subscriber needs
            self._publications = self._context.socket(zmq.XPUB)
            self._publications.set(zmq.SNDHWM, self._high_water_mark)
            self._publications.set(zmq.XPUB_VERBOSER, 1)
            self.endpoint = _bind(self._publications, self.endpoint)
            self._tasks.append(asyncio.create_task(self._count_subscribers(self._publications)))
            if self.replay_endpoint is not None:
                self._replays = self._context.socket(zmq.ROUTER)
                # room for one whole replay a client: a client that asks again before it reads loses answers
                self._replays.set(zmq.SNDHWM, (self._kept.maxlen or 0) + 1)
                self.replay_endpoint = _bind(self._replays, self.replay_endpoint)
                self._tasks.append(asyncio.create_task(self._serve_replays(self._replays)))
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close at once: frames that a subscriber has not taken yet are lost, as when an engine stops."""
        await self._close()

    async def publish(self, payload: bytes, seq: int | None = None) -> int:
        """Send a payload under the publisher's topic, keep it for replay, and return its sequence number.

        ``seq`` None: the next one. Another number starts a new count from there: a gap, or an engine's restart.
        """
        number = self.next_seq if seq is None else seq
        await self.publish_frame(self._topic, number, payload)
        return number

    async def publish_frame(self, topic: bytes, seq: int, payload: bytes) -> None:
        """Send one frame as it is, and keep it for replay."""
        if self._publications is None:
            raise SourceError(self.endpoint, "the publisher is not open", "publish inside of its `async with` block")
        await self._publications.send_multipart([topic, _SEQ.pack(seq), payload])
        self._kept.append((topic, seq, payload))
        self.next_seq = seq + 1

    async def wait_for_subscriber(self, timeout_s: float = 10.0, count: int = 1) -> None:
        """Wait until ``count`` subscriptions are in force: what is published before a subscription arrives never gets there.

        Raises SourceError after ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s), self._subscribed:
                await self._subscribed.wait_for(lambda: self.subscribers >= count)
        except TimeoutError:
            problem = f"{self.subscribers} of {count} subscribers within {timeout_s} s"
            raise SourceError(self.endpoint, problem, "start the subscriber, and connect it to this address") from None

    async def _count_subscribers(self, publications: zmq.asyncio.Socket) -> None:
        while True:
            message = await publications.recv()
            async with self._subscribed:
                if message[:1] == b"\x01":
                    self.subscribers += 1
                elif message[:1] == b"\x00":
                    self.subscribers -= 1
                self._subscribed.notify_all()

    async def _serve_replays(self, replays: zmq.asyncio.Socket) -> None:
        while True:
            request = await replays.recv_multipart()
            if len(request) != 3 or request[1] or len(request[2]) != _SEQ.size:
                self.replay_requests_malformed += 1
                continue
            client, _, start = request
            (start_seq,) = _SEQ.unpack(start)
            answers = [frame for frame in self._kept if frame[1] >= start_seq]
            for sent, (topic, seq, payload) in enumerate(answers, 1):
                await self._answer(replays, client, topic, _SEQ.pack(seq), payload)
                if sent % _REPLIES_PER_TURN == 0:
                    await asyncio.sleep(0)
            await self._answer(replays, client, b"", _END_SEQ, b"")
            self.replays_served += 1

    async def _answer(self, replays: zmq.asyncio.Socket, client: bytes, topic: bytes, seq: bytes, payload: bytes) -> None:
        topics = [topic] if self._replay_topic else []
        await replays.send_multipart([client, b"", *topics, seq, payload])

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for socket in (self._publications, self._replays):
            if socket is not None:
                socket.close(linger=0)
        self._publications = self._replays = None
        if self._own_context:
            self._context.term()
        for result in results:
            if isinstance(result, Exception):
                raise result


def _bind(socket: zmq.asyncio.Socket, endpoint: str) -> str:
    """Bind and return the bound address."""
    if "[" in endpoint:
        socket.set(zmq.IPV6, 1)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise SourceError(endpoint, f"cannot be bound: {error}", "free the address or choose another (port 0: any)") from error
    return socket.get_string(zmq.LAST_ENDPOINT)
