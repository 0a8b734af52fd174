"""One connection to an engine: a request out, an answer in, piece by piece as it comes; then the next request.

Why no client library: aiohttp's client costs about 0.3 ms of processor time for a request, this one a tenth of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import httptools

from kvatlas.serve.proxy.errors import Break, UpstreamError
from kvatlas.serve.proxy.headers import Pair

BUFFER_BYTES_MAX = 128 << 10
"""Of an answer that its client does not take: beyond it the engine is read no further."""

HEAD_BYTES_MAX = 64 << 10
"""An answer's status line and headers."""


class EngineConnection(asyncio.Protocol):
    """Made connected, by ``loop.create_connection``. One exchange at a time: ``send``, then ``read`` until it returns b""."""

    def __init__(self, lost: Callable[[EngineConnection], None]) -> None:
        """``lost``: told when the connection is gone."""
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.idle_since_s = 0.0
        self._reset()
        self._parser = httptools.HttpResponseParser(self)

    def _reset(self) -> None:
        self.status = 0
        self.headers: list[Pair] = []
        self.complete = False
        """Whether all of the answer is here; a part of it may not be read yet."""
        self.heard = False
        """Whether anything came of the answer."""
        self._answering = False  # the head is whole
        self._framed = False  # the answer tells where it ends; else it ends with the connection
        self._keep_alive = False
        self._head_bytes = 0
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._error: UpstreamError | None = None

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing() and self._error is None

    @property
    def reusable(self) -> bool:
        """Whether another request can be sent after this one."""
        return (
            self.usable
            and self.complete
            and self._keep_alive
            and self._transport is not None
            and not self._transport.get_write_buffer_size()
        )

    async def send(self, head: bytes, body: bytes, first_byte_s: float) -> None:
        """Send a request, and return when the answer's head is here. Raises UpstreamError."""
        self._reset()
        if self._transport is None:
            raise UpstreamError(Break.RESET, "it closed the connection")
        self._transport.writelines((head, body))
        while not self._answering:
            await self._wait(first_byte_s, "no answer began")

    async def read(self, idle_s: float) -> bytes:
        """Return what came of the body since the last call, as soon as anything did; b"" at its end. Raises UpstreamError."""
        while not self._pieces:
            if self.complete:
                return b""
            await self._wait(idle_s, "its answer stopped midway")
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._buffered = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return body

    def abort(self) -> None:
        """Close at once; the engine stops computing what nobody waits for."""
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self, limit_s: float, silence: str) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        timer = self._loop.call_later(limit_s, self._fail, Break.SILENT, f"{silence} for {limit_s:g} s")
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None
        if self._error is not None and not self._pieces and not self.complete:
            raise self._error

    def _fail(self, how: Break, problem: str) -> None:
        if self._error is None:
            self._error = UpstreamError(how, problem)
        self._wake()
        self.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- asyncio.Protocol -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.complete or (not self.heard and self._idle()):
            self._fail(Break.GARBAGE, "it sent what was not asked for")
            return
        self.heard = True
        if not self._answering:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(Break.GARBAGE, f"its answer is no HTTP: {error}")
            return
        if not self._answering and self._head_bytes > HEAD_BYTES_MAX:
            self._fail(Break.GARBAGE, f"its answer's headers are longer than {HEAD_BYTES_MAX} bytes")

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._answering and not self._framed and error is None and self._error is None:
            self.complete = True  # HTTP/1.0: the end of the connection is the end of the answer
        elif not self.complete and self._error is None:
            self._error = UpstreamError(Break.RESET, "it closed the connection before its answer was whole")
        self._wake()
        self._lost(self)

    def _idle(self) -> bool:
        return self._waiter is None and not self._answering

    # -- the parser's callbacks -----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:
            self._fail(Break.GARBAGE, "it sent a second answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._answering:  # else: a trailer
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._answering:
            return
        status = self._parser.get_status_code()
        if status < 200:  # such as 100 Continue: the answer is yet to come
            self.headers.clear()
            return
        self.status = status
        names = {name.lower() for name, _ in self.headers}
        self._framed = bool(names & {b"content-length", b"transfer-encoding"}) or status in (204, 304)
        self._keep_alive = self._framed and self._parser.should_keep_alive()
        self._answering = True
        self._wake()

    def on_body(self, body: bytes) -> None:
        if self.complete:
            return
        self._pieces.append(body)
        self._buffered += len(body)
        if self._buffered > BUFFER_BYTES_MAX and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        if self._answering:
            self.complete = True
            self._wake()
