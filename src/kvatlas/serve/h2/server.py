"""A port that speaks gRPC: connections accepted, drained and closed."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import cast

from kvatlas.observe.logs import get_logger
from kvatlas.serve.h2.calls import Bounds, Calls, Method

GREETING_S_MAX = 10.0
"""A peer that says nothing for so long is no client."""
UNSENT_BYTES_MAX = 4 << 20
"""A peer that leaves more than this unread is not read from until it has read."""
CLOSING_S_MAX = 1.0
"""What was said last may take so long to be read."""
BACKLOG = 1024

_log = get_logger(__name__)


class GrpcServer:
    """A port with gRPC methods. Of one event loop."""

    def __init__(self, methods: Mapping[str, Method], bounds: Bounds, connections_max: int) -> None:
        """``methods`` by path (``/package.Service/Method``); each makes the handler of a call."""
        self.methods = methods
        self.bounds = bounds
        self._connections_max = connections_max
        self._peers: set[_Peer] = set()
        self._changed = asyncio.Event()
        """A peer has no calls any more, or is gone."""
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None

    def bind(self, host: str, port: int) -> int:
        """Take a port and return it; nothing is accepted before :meth:`start`. OSError where it cannot be had."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=BACKLOG)
        taken: int = self._socket.getsockname()[1]
        return taken

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        """Begin to accept connections on the port that was taken."""
        assert self._socket is not None, "bind comes first"
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Peer(self), sock=self._socket, ssl=tls, backlog=BACKLOG)

    async def stop(self, grace_s: float) -> None:
        """Take nothing new, let calls finish within the grace, then cut the rest off."""
        if self._server is not None:
            self._server.close()
        elif self._socket is not None:
            self._socket.close()
        for peer in self._peers:
            peer.drain()
        if not await self._until_none(lambda peer: len(peer.calls) > 0, grace_s):
            _log.warning("calls are cut off: the grace is over", calls=sum(len(peer.calls) for peer in self._peers))
        for peer in list(self._peers):
            peer.close()
        await self._until_none(lambda _peer: True, CLOSING_S_MAX)
        for peer in list(self._peers):
            peer.abort()

    async def _until_none(self, which: Callable[[_Peer], bool], seconds_max: float) -> bool:
        """Wait until there is no such peer; return whether that came true in time."""
        try:
            async with asyncio.timeout(seconds_max):
                while any(map(which, self._peers)):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def arrived(self, peer: _Peer) -> bool:
        """Return whether a connection may stay."""
        if len(self._peers) >= self._connections_max:
            return False
        self._peers.add(peer)
        return True

    def changed(self, gone: _Peer | None = None) -> None:
        """A peer has no calls any more; ``gone``: or is gone itself."""
        if gone is not None:
            self._peers.discard(gone)
        self._changed.set()


class _Peer(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: GrpcServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._greeting: asyncio.TimerHandle | None = None
        self._flushing = False
        self.calls = Calls(server.methods, server.bounds, self._wake, server.changed)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._server.arrived(self):
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(UNSENT_BYTES_MAX)
        self._greeting = self._loop.call_later(GREETING_S_MAX, self._check_greeting)
        self._flush()

    def data_received(self, data: bytes) -> None:
        self.calls.receive(data)
        self._flush()

    def pause_writing(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def connection_lost(self, _error: Exception | None) -> None:
        self._transport = None
        if self._greeting is not None:
            self._greeting.cancel()
        self.calls.lost()
        self._server.changed(self)

    def drain(self) -> None:
        """Have the peer begin no more calls here."""
        self.calls.connection.go_away()
        self._flush()

    def close(self) -> None:
        """Close when all that was said is sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _wake(self) -> None:
        """Send what there is, together with what others have to send in the same turn of the loop."""
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._transport is None:
            return
        output = self.calls.connection.output()
        if output:
            self._transport.write(output)
        if self.calls.connection.failed:
            _log.warning("connection closed: the peer broke a rule of HTTP/2", problem=self.calls.connection.problem)
            self._transport.close()

    def _check_greeting(self) -> None:
        if not self.calls.connection.greeted:
            self.abort()
