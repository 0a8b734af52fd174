"""gRPC calls over one connection: messages in and out, a status at the end. IO is a function that bytes are given to.

A handler is told each message and at last, once, that its call is over. One that cannot take more for now says so with
``Call.pause``; what comes meanwhile waits, and the peer is granted no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
from grpc import StatusCode

from kvatlas.serve.h2.connection import Came, Closed, Connection, Event, Opened
from kvatlas.serve.h2.frames import ErrorCode
from kvatlas.serve.h2.headers import trailers

PREFIX_BYTES = 5
_OK = trailers(0)


class Handler(Protocol):
    """One call's other side."""

    def received(self, message: bytes) -> None: ...

    def half_closed(self) -> None:
        """The client sends no more. Told in a pause too, where no message is left."""
        ...

    def closed(self) -> None:
        """The call is over, in whatever way. Told once."""
        ...


Method = Callable[["Call"], Handler]


class Bounds(msgspec.Struct, frozen=True):
    """What one connection may cost."""

    streams_max: int
    message_bytes_max: int


class Call:
    """One call, as its handler sees it."""

    __slots__ = ("_buffer", "_calls", "_ended", "_owed", "_paused", "_stream_id", "_told", "handler")

    def __init__(self, calls: Calls, stream_id: int) -> None:
        self._calls = calls
        self._stream_id = stream_id
        self._buffer = bytearray()
        self._paused = False
        self._owed = 0
        """Bytes that came in a pause: they are not granted again before its end."""
        self._ended = False
        """Whether the client sends no more."""
        self._told = False
        """Whether the handler knows."""
        self.handler: Handler | None = None

    def send(self, message: bytes) -> None:
        """Send a message. After the end of the call nothing happens."""
        self._calls.connection.send(self._stream_id, b"\x00" + len(message).to_bytes(4, "big") + message)
        self._calls.dirty()

    def end(self, status: StatusCode = StatusCode.OK, message: str = "") -> None:
        """End the call."""
        number: int = status.value[0]
        self._calls.connection.end(self._stream_id, _OK if number == 0 else trailers(number, message))
        self._calls.over(self._stream_id)
        self._calls.dirty()

    def pause(self) -> None:
        """Take no more messages until :meth:`resume`."""
        self._paused = True

    def resume(self) -> None:
        """Take messages again; those that came meanwhile come at once."""
        self._paused = False
        self._deliver()
        if not self._paused:
            self._calls.connection.consumed(self._stream_id, self._owed)
            self._owed = 0
            self._calls.dirty()

    def came(self, data: bytes, *, ended: bool) -> None:
        """Bytes of messages came, or their end."""
        self._ended = self._ended or ended
        self._buffer += data
        if self._paused:
            self._owed += len(data)
        else:  # of a message that is longer than the grant, the rest comes only so
            self._calls.connection.consumed(self._stream_id, len(data))
        self._deliver()

    def _deliver(self) -> None:
        buffer, handler = self._buffer, self.handler
        while handler is not None and not self._paused and len(buffer) >= PREFIX_BYTES:
            length = int.from_bytes(buffer[1:PREFIX_BYTES], "big")
            if buffer[0] != 0:
                self.end(StatusCode.UNIMPLEMENTED, "messages cannot be compressed here")
                return
            if length > self._calls.bounds.message_bytes_max:
                self.end(
                    StatusCode.RESOURCE_EXHAUSTED, f"a message is longer than {self._calls.bounds.message_bytes_max} bytes"
                )
                return
            if len(buffer) < PREFIX_BYTES + length:
                break
            message = bytes(buffer[PREFIX_BYTES : PREFIX_BYTES + length])
            del buffer[: PREFIX_BYTES + length]
            handler.received(message)
            handler = self.handler
        if handler is not None and self._ended and not self._told and not (self._paused and buffer):
            self._told = True
            handler.half_closed()


class Calls:
    """All calls of one connection."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        bounds: Bounds,
        wake: Callable[[], None],
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        """``methods`` by path. ``wake``: told of output between two pieces of input; ``idle``: when no call is left."""
        self.connection = Connection(bounds.streams_max)
        self.bounds = bounds
        self._methods = methods
        self._wake = wake
        self._idle = idle
        self._calls: dict[int, Call] = {}
        self._receiving = False

    def __len__(self) -> int:
        return len(self._calls)

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer."""
        self._receiving = True
        try:
            for event in self.connection.receive(data):
                self._take(event)
        finally:
            self._receiving = False

    def dirty(self) -> None:
        """There is output."""
        if not self._receiving:
            self._wake()

    def over(self, stream_id: int) -> None:
        """A call has ended: its handler is told, and nothing more that comes for it is read."""
        call = self._calls.pop(stream_id, None)
        if call is not None and call.handler is not None:
            handler, call.handler = call.handler, None
            handler.closed()
            if not self._calls:
                self._idle()

    def lost(self) -> None:
        """The connection is gone, and all calls with it."""
        for stream_id in list(self._calls):
            self.over(stream_id)

    def _take(self, event: Event) -> None:
        if isinstance(event, Came):
            call = self._calls.get(event.stream_id)
            if call is not None:
                call.came(event.data, ended=event.ended)
        elif isinstance(event, Opened):
            self._open(event)
        elif isinstance(event, Closed):
            self.over(event.stream_id)

    def _open(self, event: Opened) -> None:
        call = Call(self, event.stream_id)
        headers = event.headers
        if headers.get(":method") != "POST" or not headers.get("content-type", "").startswith("application/grpc"):
            self.connection.reset(event.stream_id, ErrorCode.PROTOCOL_ERROR)
            return
        method = self._methods.get(headers.get(":path", ""))
        if method is None:
            call.end(StatusCode.UNIMPLEMENTED, "there is no such method here")
            return
        self._calls[event.stream_id] = call
        call.handler = method(call)
        if event.ended:
            call.came(b"", ended=True)
