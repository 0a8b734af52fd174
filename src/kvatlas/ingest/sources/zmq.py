"""ZMQ event sources: SUB sockets that connect to engines, or one that engines connect to, and the replay request.

Frames and the replay protocol are those of vLLM 0.32 and SGLang (docs/events.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from collections.abc import AsyncGenerator, Iterator
from socket import socket as socket_of

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from kvatlas.errors import SourceError
from kvatlas.ingest.sources import Origin, Sink
from kvatlas.observe.logs import get_logger
from kvatlas.types import Frame

log = get_logger("kvatlas.ingest")

_SEQ = struct.Struct(">Q")
END_SEQ = 0xFFFF_FFFF_FFFF_FFFF
"""The number of the marker that ends a replay."""

PEERS_MAX = 65_536
"""Addresses remembered of engines that connect; beyond it one that is gone is forgotten."""

_HEARTBEAT_MS = 1_000
_HEARTBEAT_TIMEOUT_MS = 5_000
_LINK_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_PEER_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED


class SocketLimits(msgspec.Struct, frozen=True):
    """Bounds of a subscription."""

    receive_high_water_mark: int = 100_000
    """Frames that wait in the socket; beyond it the engine drops frames, which shows as a gap and is healed."""
    frame_bytes_max: int = 64 << 20
    reconnect_min_s: float = 0.1
    reconnect_max_s: float = 10.0
    """Reconnects back off exponentially between the two."""


class _Subscriber:
    """A SUB socket with a monitor, while it is needed."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        origin: Origin,
        *,
        topic_filter: str = "",
        limits: SocketLimits | None = None,
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._origin = origin
        self._topic_filter = topic_filter
        self._limits = limits or SocketLimits()

    @property
    def name(self) -> str:
        return self._endpoint

    @contextlib.contextmanager
    def _open(self, link_events: int) -> Iterator[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]]:
        """Yield the socket, neither bound nor connected yet, and the monitor of its link events."""
        limits = self._limits
        socket = self._context.socket(zmq.SUB)
        try:
            socket.set(zmq.RCVHWM, limits.receive_high_water_mark)
            socket.set(zmq.MAXMSGSIZE, limits.frame_bytes_max)
            socket.set(zmq.RECONNECT_IVL, int(limits.reconnect_min_s * 1000))
            socket.set(zmq.RECONNECT_IVL_MAX, int(limits.reconnect_max_s * 1000))
            socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
            socket.set(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
            socket.set_string(zmq.SUBSCRIBE, self._topic_filter)
            yield socket, socket.get_monitor_socket(link_events)
        finally:
            socket.disable_monitor()
            socket.close(linger=0)


class ZmqSource(_Subscriber):
    """A SUB socket connected to one engine's rank. SourceError from ``run`` if the endpoint is none."""

    async def run(self, sink: Sink) -> None:
        with self._open(_LINK_EVENTS) as (socket, monitor):
            socket.set(zmq.IPV6, 1)
            try:
                socket.connect(self._endpoint)
            except zmq.ZMQError as error:
                remedy = "an engine's address is like tcp://10.0.0.7:5557"
                raise SourceError(self._endpoint, str(error), remedy) from error
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(socket, sink))
                tasks.create_task(self._watch_link(monitor, sink))

    async def _receive(self, socket: zmq.asyncio.Socket, sink: Sink) -> None:
        while True:
            take(await socket.recv_multipart(), self._origin, sink)

    async def _watch_link(self, monitor: zmq.asyncio.Socket, sink: Sink) -> None:
        while True:
            event = await recv_monitor_message(monitor)
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                sink.connected(self._origin)
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                sink.disconnected(self._origin)


class ZmqCentralSource(_Subscriber):
    """A SUB socket bound to an address that engines connect to.

    Each peer address is an origin of its own: when its last connection ends, its streams are known to be cut off. Engines
    that share an address (behind a proxy, or on one host) are told apart by their topics only, so there the loss of one
    shows when the last one goes, or by its replay endpoint.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        origin: Origin,
        *,
        topic_filter: str = "",
        limits: SocketLimits | None = None,
    ) -> None:
        super().__init__(context, endpoint, origin, topic_filter=topic_filter, limits=limits)
        self._peers: dict[str, Origin] = {}
        self._connections: dict[int, str] = {}
        """Peer address by file descriptor."""
        self.bound_endpoint: str | None = None
        """The real address after binding to port 0."""

    async def run(self, sink: Sink) -> None:
        with self._open(_PEER_EVENTS) as (socket, monitor):
            socket.set(zmq.IPV6, "[" in self._endpoint)
            try:
                socket.bind(self._endpoint)
            except zmq.ZMQError as error:
                remedy = "free the address, set zmq.endpoint to another, or zmq.bind=false to do without"
                raise SourceError(self._endpoint, str(error), remedy) from error
            self.bound_endpoint = socket.get_string(zmq.LAST_ENDPOINT)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(socket, sink))
                tasks.create_task(self._watch_peers(monitor, sink))

    async def _receive(self, socket: zmq.asyncio.Socket, sink: Sink) -> None:
        while True:
            parts = await socket.recv_multipart(copy=False)
            try:
                peer = _plain_address(str(parts[-1].get("Peer-Address")))
            except zmq.ZMQError:  # another transport than TCP
                peer = ""
            take([part.bytes for part in parts], self._peer(peer), sink)

    def _peer(self, address: str) -> Origin:
        if address not in self._peers:
            if len(self._peers) >= PEERS_MAX:
                gone = next((known for known in self._peers if known not in self._connections.values()), address)
                self._peers.pop(gone, None)
            source = f"{self._endpoint} from {address}" if address else self._endpoint
            self._peers[address] = msgspec.structs.replace(self._origin, source=source)
        return self._peers[address]

    async def _watch_peers(self, monitor: zmq.asyncio.Socket, sink: Sink) -> None:
        while True:
            event = await recv_monitor_message(monitor)
            descriptor = int(event["value"])
            if event["event"] == zmq.EVENT_ACCEPTED:
                address = _peer_of(descriptor)
                if address is not None:
                    self._connections[descriptor] = address
                    sink.connected(self._peer(address))
                continue
            address = self._connections.pop(descriptor, None)
            if address is not None and address not in self._connections.values():
                sink.disconnected(self._peer(address))


def _peer_of(descriptor: int) -> str | None:
    """Return the address at the other end of a connection that ZMQ has accepted; None if it is gone already."""
    try:
        with socket_of(fileno=os.dup(descriptor)) as connection:
            return _plain_address(connection.getpeername()[0])
    except (OSError, IndexError, TypeError):
        return None


def _plain_address(address: str) -> str:
    return address.removeprefix("::ffff:")


def take(parts: list[bytes], origin: Origin, sink: Sink) -> None:
    """Hand a message to the sink, as a frame or as what is wrong with it."""
    frame = frame_of(parts)
    if isinstance(frame, str):
        sink.malformed(origin, frame)
    else:
        sink.frame(origin, frame)


class ZmqReplayer:
    """Asks an engine's ROUTER for frames it keeps. A socket a request: answers of an earlier one can't mix in."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, timeout_s: float, limits: SocketLimits) -> None:
        self._context = context
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._limits = limits

    async def replay(self, start_seq: int) -> AsyncGenerator[Frame, None]:
        socket = self._context.socket(zmq.DEALER)
        try:
            socket.set(zmq.RCVHWM, self._limits.receive_high_water_mark)
            socket.set(zmq.MAXMSGSIZE, self._limits.frame_bytes_max)
            socket.set(zmq.IPV6, 1)
            with contextlib.suppress(zmq.ZMQError):
                socket.connect(self._endpoint)
            await asyncio.wait_for(socket.send_multipart([b"", _SEQ.pack(start_seq)]), self._timeout_s)
            while True:
                parts = await asyncio.wait_for(socket.recv_multipart(), self._timeout_s)
                frame = frame_of(parts[1:] if parts and not parts[0] else parts)
                if isinstance(frame, str):
                    log.warning("replay answer is no frame", endpoint=self._endpoint, problem=frame)
                elif frame.seq == END_SEQ:
                    return
                else:
                    yield frame
        except zmq.ZMQError as error:
            raise OSError(f"{self._endpoint}: {error}") from error
        finally:
            socket.close(linger=0)


def frame_of(parts: list[bytes]) -> Frame | str:
    """Return the frame in a message's parts, or what is wrong with them.

    ``[topic, seq, payload]``; replies of older engines and SGLang lack the topic.
    """
    if len(parts) == 2:
        parts = [b"", *parts]
    if len(parts) != 3:
        return f"{len(parts)} parts instead of topic, seq and payload"
    topic, seq, payload = parts
    if len(seq) != _SEQ.size:
        return f"sequence number of {len(seq)} bytes instead of 8"
    return Frame(topic.decode("utf-8", "replace"), _SEQ.unpack(seq)[0], payload, time.time_ns())
