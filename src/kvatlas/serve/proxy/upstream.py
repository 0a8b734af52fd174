"""Calls to engines: connections are kept and used again, and bounded for each engine."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque

import msgspec

from kvatlas.route.endpoint import Endpoint
from kvatlas.serve.proxy.connection import EngineConnection
from kvatlas.serve.proxy.errors import Break, UpstreamError


class UpstreamLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a call may cost. Times in seconds."""

    connections_max: int
    connect_s: float
    first_byte_s: float
    idle_s: float
    keep_alive_s: float


class Upstream:
    """Sends requests to engines. Runs in one event loop."""

    def __init__(self, limits: UpstreamLimits, tls: ssl.SSLContext | None = None) -> None:
        """``tls``: for endpoints that want it."""
        self.limits = limits
        self._tls = tls
        self._engines: dict[str, _Engine] = {}

    async def send(self, endpoint: Endpoint, head: bytes, body: bytes) -> EngineConnection:
        """Send a request, and return the connection when its answer begins; :meth:`release` it in the end.

        Raises UpstreamError. A connection that was kept may have been closed by the engine just now: then a new one is made.
        """
        engine = self._engines.get(endpoint.url)
        if engine is None:
            engine = self._engines[endpoint.url] = _Engine(self._engines, endpoint.url)
        kept = engine.take(asyncio.get_running_loop().time() - self.limits.keep_alive_s)
        if kept is not None:
            try:
                return await self._exchange(kept, head, body)
            except UpstreamError as error:
                if error.how is not Break.RESET or kept.heard:
                    raise
                engine.close_idle()
        return await self._exchange(await self._connect(engine, endpoint), head, body)

    def release(self, endpoint: Endpoint, connection: EngineConnection) -> None:
        """Take a connection back: to be used again where its answer was read to the end, else closed."""
        engine = self._engines.get(endpoint.url)
        if engine is not None and connection.reusable:
            connection.idle_since_s = asyncio.get_running_loop().time()
            engine.idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        """Close every connection."""
        for engine in list(self._engines.values()):
            for connection in list(engine.open):
                connection.abort()

    async def _exchange(self, connection: EngineConnection, head: bytes, body: bytes) -> EngineConnection:
        try:
            await connection.send(head, body, self.limits.first_byte_s)
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _connect(self, engine: _Engine, endpoint: Endpoint) -> EngineConnection:
        if len(engine.open) + engine.connecting >= self.limits.connections_max:
            raise UpstreamError(Break.ALL_IN_USE, f"all {self.limits.connections_max} connections to it are in use")
        engine.connecting += 1
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.limits.connect_s):
                _, connection = await loop.create_connection(
                    lambda: EngineConnection(engine.lost),
                    endpoint.address,
                    endpoint.port,
                    ssl=self._tls if endpoint.tls else None,
                )
                engine.open.add(connection)
        except TimeoutError:
            raise UpstreamError(Break.NO_CONNECTION, f"no connection within {self.limits.connect_s:g} s") from None
        except OSError as error:  # ssl.SSLError is one
            raise UpstreamError(Break.NO_CONNECTION, f"no connection: {error.strerror or error}") from None
        finally:
            engine.connecting -= 1
            engine.forget_if_unused()
        return connection


class _Engine:
    """The connections to one address."""

    def __init__(self, engines: dict[str, _Engine], url: str) -> None:
        self.open: set[EngineConnection] = set()
        self.idle: deque[EngineConnection] = deque()
        """A part of ``open``; the one used last is at the end."""
        self.connecting = 0
        self._engines = engines
        self._url = url

    def take(self, since_s: float) -> EngineConnection | None:
        """Return the connection that was used last, unless that was before ``since_s``: then all are too old."""
        while self.idle:
            connection = self.idle.pop()
            if connection.idle_since_s < since_s:
                self.idle.append(connection)
                self.close_idle()
                return None
            if connection.usable:
                return connection
        return None

    def close_idle(self) -> None:
        while self.idle:
            self.idle.pop().abort()

    def lost(self, connection: EngineConnection) -> None:
        self.open.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        self.forget_if_unused()

    def forget_if_unused(self) -> None:
        if not self.open and not self.connecting and self._engines.get(self._url) is self:
            del self._engines[self._url]
