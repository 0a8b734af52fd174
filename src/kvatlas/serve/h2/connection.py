"""One HTTP/2 connection, seen from the server: bytes in, events out, and bytes to send. No IO, no clock.

A peer that breaks a rule gets a GOAWAY, and nothing that it sends later is read. Bounds: streams at a time, the size of
headers, and flow control both ways: what came is granted again when it was consumed, what is sent waits for the peer's grant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from kvatlas.serve.h2 import frames
from kvatlas.serve.h2.frames import ErrorCode, H2Error, Setting
from kvatlas.serve.h2.headers import LIST_BYTES_MAX, RESPONSE, HeaderReader

CONNECTION_WINDOW = 16 << 20
STREAM_WINDOW = 1 << 20


class Opened(msgspec.Struct, frozen=True, gc=False):
    """A stream began."""

    stream_id: int
    headers: Mapping[str, str]
    ended: bool


class Came(msgspec.Struct, frozen=True, gc=False):
    """Data came. It has to be confirmed with :meth:`Connection.consumed`."""

    stream_id: int
    data: bytes
    ended: bool


class Closed(msgspec.Struct, frozen=True, gc=False):
    """The peer gave a stream up; it is forgotten."""

    stream_id: int


Event = Opened | Came | Closed


class _Stream:
    __slots__ = ("answered", "closing", "ended", "granted", "pending", "sendable", "unconfirmed")

    def __init__(self, sendable: int) -> None:
        self.sendable = sendable
        """Bytes that the peer grants us."""
        self.granted = STREAM_WINDOW
        """Bytes that we grant the peer."""
        self.unconfirmed = 0
        """Bytes consumed and not granted again yet."""
        self.pending = bytearray()
        """To be sent when the peer grants it."""
        self.closing: bytes | None = None
        """Trailers, to be sent behind it."""
        self.answered = False
        """Whether headers were sent."""
        self.ended = False
        """Whether the peer ended its side."""


class Connection:
    """The state of one connection."""

    def __init__(self, streams_max: int) -> None:
        self._streams_max = streams_max
        self._streams: dict[int, _Stream] = {}
        self._last_id = 0
        self._rest = b""
        self._greeted = False
        self._reader = HeaderReader()
        self._block: tuple[int, bool, bytes] | None = None
        """Headers that are not complete: stream, whether it ends with them, what came."""
        self._sendable = frames.WINDOW_DEFAULT
        self._stream_sendable = frames.WINDOW_DEFAULT
        self._frame_bytes = frames.FRAME_BYTES_MAX
        self._granted = CONNECTION_WINDOW
        self._unconfirmed = 0
        self._waiting: dict[int, None] = {}
        """Streams with something to send, in the order of their turns."""
        offered = {
            Setting.HEADER_TABLE_SIZE: 0,
            Setting.MAX_CONCURRENT_STREAMS: streams_max,
            Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            Setting.MAX_HEADER_LIST_SIZE: LIST_BYTES_MAX,
        }
        self._out = [frames.settings(offered), frames.window_update(0, CONNECTION_WINDOW - frames.WINDOW_DEFAULT)]
        self.problem: str | None = None
        """The rule that the peer broke: the connection is to be closed when the output is sent."""

    @property
    def failed(self) -> bool:
        return self.problem is not None

    @property
    def greeted(self) -> bool:
        """Whether the peer has shown that it speaks HTTP/2."""
        return self._greeted

    @property
    def pending_bytes(self) -> int:
        """What waits for the peer's grants."""
        return sum(len(stream.pending) for stream in self._streams.values())

    def output(self) -> bytes:
        """Return what is to be sent now."""
        out = b"".join(self._out)
        self._out.clear()
        return out

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes; return what they mean."""
        events: list[Event] = []
        if self.failed:
            return events
        self._rest = self._rest + data if self._rest else data
        try:
            if self._greeted or self._greet():
                self._frames(events)
        except H2Error as error:
            self._out.append(frames.goaway(self._last_id, error.code, str(error)))
            self.problem = str(error)
        return events

    # -- what is sent ---------------------------------------------------------------------------------------------------

    def send(self, stream_id: int, data: bytes) -> None:
        """Send data of an open stream; the first goes behind the headers of the answer."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.closing is not None:
            return
        if not stream.answered:
            stream.answered = True
            self._out.append(frames.frame(frames.HEADERS, frames.END_HEADERS, stream_id, RESPONSE))
        count = len(data)
        if not stream.pending and count <= min(self._sendable, stream.sendable, self._frame_bytes):
            self._out.append(frames.frame(frames.DATA, 0, stream_id, data))
            self._sendable -= count
            stream.sendable -= count
        else:
            stream.pending += data
            self._push(stream_id, stream)

    def end(self, stream_id: int, trailers: bytes) -> None:
        """End our side of a stream, behind all that was sent."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.closing is not None:
            return
        stream.closing = trailers if stream.answered else RESPONSE + trailers
        self._push(stream_id, stream)

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        """Give a stream up."""
        if self._streams.pop(stream_id, None) is not None:
            self._waiting.pop(stream_id, None)
            self._out.append(frames.rst_stream(stream_id, code))

    def consumed(self, stream_id: int, count: int) -> None:
        """So many bytes of a stream's data were dealt with: the peer may send as many again."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.ended:
            return
        stream.unconfirmed += count
        if stream.unconfirmed >= STREAM_WINDOW // 2:
            self._out.append(frames.window_update(stream_id, stream.unconfirmed))
            stream.granted += stream.unconfirmed
            stream.unconfirmed = 0

    def go_away(self) -> None:
        """Ask the peer to begin no more streams here. Those that it has begun meanwhile are served."""
        self._out.append(frames.goaway(frames.STREAM_ID_MAX, ErrorCode.NO_ERROR))

    def _push(self, stream_id: int, stream: _Stream) -> None:
        """Send as much as is granted."""
        while stream.pending:
            count = min(len(stream.pending), self._sendable, stream.sendable, self._frame_bytes)
            if count <= 0:
                self._waiting[stream_id] = None
                return
            self._out.append(frames.frame(frames.DATA, 0, stream_id, bytes(stream.pending[:count])))
            del stream.pending[:count]
            self._sendable -= count
            stream.sendable -= count
        self._waiting.pop(stream_id, None)
        if stream.closing is not None:
            flags = frames.END_HEADERS | frames.END_STREAM
            self._out.append(frames.frame(frames.HEADERS, flags, stream_id, stream.closing))
            if stream.ended:
                del self._streams[stream_id]

    def _push_all(self) -> None:
        for stream_id in list(self._waiting):
            if self._sendable <= 0:
                return
            self._push(stream_id, self._streams[stream_id])

    # -- what comes -----------------------------------------------------------------------------------------------------

    def _greet(self) -> bool:
        expected = frames.PREFACE[: len(self._rest)]
        if not self._rest.startswith(expected):
            raise H2Error(ErrorCode.PROTOCOL_ERROR, "no HTTP/2")
        if len(self._rest) < len(frames.PREFACE):
            return False
        self._rest = self._rest[len(frames.PREFACE) :]
        self._greeted = True
        return True

    def _frames(self, events: list[Event]) -> None:
        for kind, flags, stream_id, payload in self._complete():
            if self._block is not None and kind != frames.CONTINUATION:
                raise H2Error(ErrorCode.PROTOCOL_ERROR, "headers were interrupted")
            if kind == frames.DATA:
                self._data(flags, stream_id, payload, events)
            elif kind == frames.HEADERS:
                self._headers(flags, stream_id, payload, events)
            elif kind == frames.CONTINUATION:
                self._continuation(flags, stream_id, payload, events)
            elif kind == frames.RST_STREAM:
                self._rst_stream(stream_id, payload, events)
            elif kind == frames.WINDOW_UPDATE:
                self._window_update(stream_id, payload, events)
            elif kind == frames.SETTINGS:
                self._settings(flags, stream_id, payload)
            elif kind == frames.PING:
                self._ping(flags, stream_id, payload)
            elif kind == frames.PUSH_PROMISE:
                raise H2Error(ErrorCode.PROTOCOL_ERROR, "a client cannot push")

    def _complete(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield frames that are complete."""
        data, at = self._rest, 0
        try:
            while len(data) - at >= frames.HEAD_BYTES:
                length = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
                if length > frames.FRAME_BYTES_MAX:
                    raise H2Error(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
                start = at + frames.HEAD_BYTES
                if len(data) - start < length:
                    return
                kind, flags = data[at + 3], data[at + 4]
                stream_id = int.from_bytes(data[at + 5 : start], "big") & frames.STREAM_ID_MAX
                at = start + length
                yield kind, flags, stream_id, data[start:at]
        finally:
            self._rest = data[at:]

    def _data(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        self._granted -= len(payload)
        if self._granted < 0:
            raise H2Error(ErrorCode.FLOW_CONTROL_ERROR, "more data than was granted")
        self._unconfirmed += len(payload)
        if self._unconfirmed >= CONNECTION_WINDOW // 2:
            self._out.append(frames.window_update(0, self._unconfirmed))
            self._granted += self._unconfirmed
            self._unconfirmed = 0
        if stream_id == 0 or stream_id > self._last_id:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, "data of no stream")
        stream = self._streams.get(stream_id)
        if stream is None:
            return  # it was given up here while the data was on its way
        if stream.ended:
            raise H2Error(ErrorCode.STREAM_CLOSED, "data behind the end of a stream")
        stream.granted -= len(payload)
        if stream.granted < 0:
            raise H2Error(ErrorCode.FLOW_CONTROL_ERROR, "more data than was granted to the stream")
        data = frames.unpadded(flags, payload)
        ended = bool(flags & frames.END_STREAM)
        if len(data) < len(payload):
            self.consumed(stream_id, len(payload) - len(data))
        if ended:
            self._ended(stream_id, stream)
        events.append(Came(stream_id, data, ended))

    def _headers(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        block = frames.unpadded(flags, payload)
        if flags & frames.WITH_PRIORITY:
            if len(block) < 5:
                raise H2Error(ErrorCode.FRAME_SIZE_ERROR, "a priority that is cut short")
            block = block[5:]
        ended = bool(flags & frames.END_STREAM)
        if flags & frames.END_HEADERS:
            self._block_complete(stream_id, ended, block, events)
        else:
            self._block = (stream_id, ended, block)

    def _continuation(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if self._block is None or self._block[0] != stream_id:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, "a continuation of nothing")
        block = self._block[2] + payload
        if len(block) > LIST_BYTES_MAX or not payload:
            raise H2Error(ErrorCode.ENHANCE_YOUR_CALM, f"more than {LIST_BYTES_MAX} bytes of headers, or empty ones")
        if flags & frames.END_HEADERS:
            ended = self._block[1]
            self._block = None
            self._block_complete(stream_id, ended, block, events)
        else:
            self._block = (stream_id, self._block[1], block)

    def _block_complete(self, stream_id: int, ended: bool, block: bytes, events: list[Event]) -> None:
        headers = self._reader.read(block)
        stream = self._streams.get(stream_id)
        if stream is not None:  # trailers
            if not ended or stream.ended:
                raise H2Error(ErrorCode.PROTOCOL_ERROR, "headers in the middle of a stream")
            self._ended(stream_id, stream)
            events.append(Came(stream_id, b"", ended=True))
            return
        if stream_id % 2 == 0 or stream_id <= self._last_id:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, f"a new stream cannot be number {stream_id}")
        self._last_id = stream_id
        if len(self._streams) >= self._streams_max:
            self._out.append(frames.rst_stream(stream_id, ErrorCode.REFUSED_STREAM))
            return
        stream = self._streams[stream_id] = _Stream(self._stream_sendable)
        stream.ended = ended
        events.append(Opened(stream_id, headers, ended))

    def _ended(self, stream_id: int, stream: _Stream) -> None:
        stream.ended = True
        if stream.closing is not None and not stream.pending:
            del self._streams[stream_id]

    def _rst_stream(self, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise H2Error(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM of a wrong length")
        if stream_id == 0 or stream_id > self._last_id:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, "RST_STREAM of no stream")
        self._forget(stream_id, events)

    def _forget(self, stream_id: int, events: list[Event]) -> None:
        if self._streams.pop(stream_id, None) is not None:
            self._waiting.pop(stream_id, None)
            events.append(Closed(stream_id))

    def _window_update(self, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise H2Error(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE of a wrong length")
        increment = int.from_bytes(payload, "big") & frames.WINDOW_MAX
        if stream_id == 0:
            self._sendable += increment
            if increment == 0 or self._sendable > frames.WINDOW_MAX:
                raise H2Error(ErrorCode.FLOW_CONTROL_ERROR, "a grant of nothing, or beyond all bounds")
            self._push_all()
            return
        if stream_id > self._last_id:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, "a grant to no stream")
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.sendable += increment
        if increment == 0 or stream.sendable > frames.WINDOW_MAX:
            self._out.append(frames.rst_stream(stream_id, ErrorCode.FLOW_CONTROL_ERROR))
            self._forget(stream_id, events)
        elif stream.pending:
            self._push(stream_id, stream)

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id != 0:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, "SETTINGS of a stream")
        if flags & frames.ACK:
            self._reader.table_gone()
            return
        for name, value in frames.read_settings(payload):
            if name == Setting.INITIAL_WINDOW_SIZE:
                if value > frames.WINDOW_MAX:
                    raise H2Error(ErrorCode.FLOW_CONTROL_ERROR, "a window beyond all bounds")
                for stream in self._streams.values():
                    stream.sendable += value - self._stream_sendable
                self._stream_sendable = value
            elif name == Setting.MAX_FRAME_SIZE:
                if not frames.FRAME_BYTES_MAX <= value < 1 << 24:
                    raise H2Error(ErrorCode.PROTOCOL_ERROR, "a frame size beyond all bounds")
                self._frame_bytes = min(value, frames.FRAME_BYTES_MAX)
        self._out.append(frames.frame(frames.SETTINGS, frames.ACK, 0))
        self._push_all()

    def _ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id != 0 or len(payload) != 8:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, "a broken PING")
        if not flags & frames.ACK:
            self._out.append(frames.frame(frames.PING, frames.ACK, 0, payload))
