"""HTTP/2 as the server sees it: rules kept and broken, flow control both ways, headers with and without a table."""

from __future__ import annotations

import pytest
from hpack import Decoder, Encoder

from kvatlas.serve.h2 import frames
from kvatlas.serve.h2.connection import CONNECTION_WINDOW, STREAM_WINDOW, Came, Closed, Connection, Opened
from kvatlas.serve.h2.frames import ErrorCode, Setting, frame
from kvatlas.serve.h2.headers import trailers

HEADERS = {":method": "POST", ":scheme": "http", ":path": "/a.B/C", ":authority": "x", "content-type": "application/grpc"}
NO_TABLE = frame(frames.SETTINGS, frames.ACK, 0)


class Peer:
    """A client of a connection: what it sends as frames, what it gets as (kind, flags, stream, payload)."""

    def __init__(self, streams_max: int = 10, settings: dict[Setting, int] | None = None) -> None:
        self.connection = Connection(streams_max)
        self.encoder = Encoder()
        self.got()
        assert self.connection.receive(frames.PREFACE + frames.settings(settings or {})) == []
        assert [kind for kind, *_ in self.got()] == [frames.SETTINGS]

    def send(self, *parts: bytes) -> list[object]:
        return list(self.connection.receive(b"".join(parts)))

    def open(self, stream_id: int, *, ends: bool = False) -> bytes:
        flags = frames.END_HEADERS | (frames.END_STREAM if ends else 0)
        return frame(frames.HEADERS, flags, stream_id, self.encoder.encode(HEADERS))

    def got(self) -> list[tuple[int, int, int, bytes]]:
        data, found = self.connection.output(), []
        while data:
            length = int.from_bytes(data[:3], "big")
            found.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + length]))
            data = data[9 + length :]
        return found

    def error(self) -> ErrorCode:
        """Return why the connection was given up."""
        kind, _, _, payload = self.got()[-1]
        assert kind == frames.GOAWAY
        assert self.connection.failed
        return ErrorCode(int.from_bytes(payload[4:8], "big"))


def data(stream_id: int, payload: bytes, *, ends: bool = False) -> bytes:
    return frame(frames.DATA, frames.END_STREAM if ends else 0, stream_id, payload)


def update(stream_id: int, increment: int) -> bytes:
    return frames.window_update(stream_id, increment)


def test_a_stream_is_opened_read_answered_and_forgotten() -> None:
    peer = Peer()
    assert peer.send(peer.open(1), data(1, b"hello"), data(1, b"", ends=True)) == [
        Opened(1, HEADERS, False),
        Came(1, b"hello", False),
        Came(1, b"", True),
    ]
    peer.connection.send(1, b"answer")
    peer.connection.end(1, trailers(0))
    got = peer.got()
    assert [(kind, flags) for kind, flags, _, _ in got] == [
        (frames.HEADERS, frames.END_HEADERS),
        (frames.DATA, 0),
        (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM),
    ]
    decoder = Decoder()
    assert dict(decoder.decode(got[0][3])) == {":status": "200", "content-type": "application/grpc"}
    assert got[1][3] == b"answer"
    assert dict(decoder.decode(got[2][3])) == {"grpc-status": "0"}
    assert peer.send(data(1, b"late")) == []
    assert not peer.connection.failed


def test_an_end_without_an_answer_is_headers_and_trailers_in_one() -> None:
    peer = Peer()
    peer.send(peer.open(1))
    peer.connection.end(1, trailers(12, "no\nway 100%"))
    ((_, flags, _, payload),) = peer.got()
    assert flags & frames.END_STREAM
    assert dict(Decoder().decode(payload)) == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-status": "12",
        "grpc-message": "no%0Away 100%25",
    }


def test_frames_cut_anywhere_are_the_same_frames() -> None:
    peer = Peer()
    sent = peer.open(1) + data(1, b"hello") + frame(frames.PING, 0, 0, b"12345678")
    events = [event for position in range(len(sent)) for event in peer.send(sent[position : position + 1])]
    assert events == [Opened(1, HEADERS, False), Came(1, b"hello", False)]
    assert peer.got() == [(frames.PING, frames.ACK, 0, b"12345678")]


def test_a_block_that_was_read_once_is_looked_up_when_there_is_no_table() -> None:
    peer = Peer()
    peer.send(peer.open(1), NO_TABLE)
    peer.encoder.header_table_size = 0
    first, second, third = (peer.open(number) for number in (3, 5, 7))
    assert first != second  # the first says that the table is gone
    assert second[9:] == third[9:]
    opened = [event for event in peer.send(first, second, third) if isinstance(event, Opened)]
    assert [event.headers for event in opened] == [HEADERS] * 3
    assert opened[1].headers is opened[2].headers


def test_a_table_that_was_forbidden_is_an_error() -> None:
    peer = Peer()
    peer.send(NO_TABLE, peer.open(1))
    assert peer.error() is ErrorCode.COMPRESSION_ERROR


def test_headers_may_come_in_pieces_padded_and_with_a_priority() -> None:
    peer = Peer()
    block = peer.encoder.encode(HEADERS)
    flags = frames.PADDED | frames.WITH_PRIORITY
    first = frame(frames.HEADERS, flags, 1, b"\x03" + b"\0\0\0\0\x10" + block[:7] + b"\0\0\0")
    assert peer.send(first, frame(frames.CONTINUATION, 0, 1, block[7:9])) == []
    assert peer.send(frame(frames.CONTINUATION, frames.END_HEADERS, 1, block[9:])) == [Opened(1, HEADERS, False)]
    assert peer.send(frame(frames.DATA, frames.PADDED, 1, b"\x02hi\0\0")) == [Came(1, b"hi", False)]


def test_trailers_end_a_stream() -> None:
    peer = Peer()
    block = peer.encoder.encode({"x": "y"})
    events = peer.send(peer.open(1), frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1, block))
    assert events[-1] == Came(1, b"", True)


def test_what_is_sent_waits_for_the_peers_grants() -> None:
    peer = Peer(settings={Setting.INITIAL_WINDOW_SIZE: 10})
    peer.send(peer.open(1, ends=True))
    peer.connection.send(1, b"x" * 25)
    peer.connection.end(1, trailers(0))
    assert [payload for kind, _, _, payload in peer.got() if kind == frames.DATA] == [b"x" * 10]
    assert peer.connection.pending_bytes == 15
    peer.send(update(1, 5))
    assert [payload for _, _, _, payload in peer.got()] == [b"x" * 5]
    peer.send(frames.settings({Setting.INITIAL_WINDOW_SIZE: 20}))
    kinds = [(kind, len(payload)) for kind, _, _, payload in peer.got()]
    assert kinds[:2] == [(frames.SETTINGS, 0), (frames.DATA, 10)]
    assert kinds[2][0] == frames.HEADERS


def test_the_grant_of_the_connection_is_shared_by_its_streams() -> None:
    peer = Peer(settings={Setting.INITIAL_WINDOW_SIZE: 1 << 20})
    peer.send(peer.open(1), peer.open(3))
    peer.connection.send(1, b"a" * 65_000)
    peer.connection.send(3, b"b" * 65_000)
    sent = sum(len(payload) for kind, _, _, payload in peer.got() if kind == frames.DATA)
    assert sent == frames.WINDOW_DEFAULT
    peer.send(update(0, 100_000))
    sent = sum(len(payload) for kind, _, _, payload in peer.got() if kind == frames.DATA)
    assert sent == 130_000 - frames.WINDOW_DEFAULT


def test_long_data_goes_in_frames_that_any_peer_takes() -> None:
    peer = Peer(settings={Setting.INITIAL_WINDOW_SIZE: 1 << 20, Setting.MAX_FRAME_SIZE: 1 << 20})
    peer.send(peer.open(1), update(0, 1 << 20))
    peer.connection.send(1, b"x" * 40_000)
    assert [len(payload) for kind, _, _, payload in peer.got() if kind == frames.DATA] == [16_384, 16_384, 7_232]


def test_what_was_consumed_is_granted_again() -> None:
    peer = Peer()
    peer.send(peer.open(1))
    count = 0
    while count < STREAM_WINDOW // 2:
        peer.send(data(1, b"x" * 16_384))
        count += 16_384
    assert peer.got() == []
    peer.connection.consumed(1, count)
    assert peer.got() == [(frames.WINDOW_UPDATE, 0, 1, count.to_bytes(4, "big"))]


def test_a_stream_that_takes_more_than_was_granted_ends_the_connection() -> None:
    peer = Peer()
    peer.send(peer.open(1))
    for _ in range(STREAM_WINDOW // 16_384):
        peer.send(data(1, b"x" * 16_384))
    assert not peer.connection.failed
    peer.send(data(1, b"x"))
    assert peer.error() is ErrorCode.FLOW_CONTROL_ERROR


def test_the_connections_grant_is_renewed_as_data_comes() -> None:
    peer = Peer()
    granted = 0
    for stream_id in range(1, 2 * CONNECTION_WINDOW // STREAM_WINDOW * 2, 2):
        peer.send(peer.open(stream_id))
        for _ in range(STREAM_WINDOW // 16_384):
            peer.send(data(stream_id, b"x" * 16_384))
        peer.connection.reset(stream_id, ErrorCode.CANCEL)
        granted += sum(int.from_bytes(payload, "big") for kind, _, number, payload in peer.got() if kind == 8 and number == 0)
    assert not peer.connection.failed
    assert granted >= CONNECTION_WINDOW


def test_streams_beyond_the_bound_are_refused_and_their_headers_still_read() -> None:
    peer = Peer(streams_max=1)
    assert len(peer.send(peer.open(1), peer.open(3))) == 1
    assert peer.got() == [(frames.RST_STREAM, 0, 3, ErrorCode.REFUSED_STREAM.to_bytes(4, "big"))]
    peer.connection.end(1, trailers(0))
    assert peer.send(data(1, b"", ends=True), peer.open(5))[-1] == Opened(5, HEADERS, False)


def test_a_stream_that_the_peer_gives_up_is_told_once() -> None:
    peer = Peer()
    reset = frames.rst_stream(1, ErrorCode.CANCEL)
    assert peer.send(peer.open(1), reset, reset)[1:] == [Closed(1)]
    peer.connection.send(1, b"to nobody")
    peer.connection.end(1, trailers(0))
    assert peer.got() == []


def test_unknown_frames_priorities_and_goodbyes_are_passed_over() -> None:
    peer = Peer()
    events = peer.send(
        frame(0x77, 0xFF, 3, b"?"), frame(frames.PRIORITY, 0, 1, b"\0" * 5), frame(frames.GOAWAY, 0, 0, b"\0" * 8)
    )
    assert events == []
    assert peer.got() == []


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ([data(1, b"x")], ErrorCode.PROTOCOL_ERROR),
        ([data(0, b"x")], ErrorCode.PROTOCOL_ERROR),
        (["open 2"], ErrorCode.PROTOCOL_ERROR),
        (["open 0"], ErrorCode.PROTOCOL_ERROR),
        (["open 3", "open 1"], ErrorCode.PROTOCOL_ERROR),
        (["open 1", "open 1"], ErrorCode.PROTOCOL_ERROR),
        (["open 1", data(1, b"", ends=True), data(1, b"x")], ErrorCode.STREAM_CLOSED),
        ([frame(frames.HEADERS, 0, 1, b"\x88"), data(1, b"")], ErrorCode.PROTOCOL_ERROR),
        ([frame(frames.HEADERS, 0, 1, b"\x88"), frame(frames.CONTINUATION, 0, 3, b"\x88")], ErrorCode.PROTOCOL_ERROR),
        ([frame(frames.HEADERS, 0, 1, b""), frame(frames.CONTINUATION, 0, 1, b"")], ErrorCode.ENHANCE_YOUR_CALM),
        (
            [frame(frames.HEADERS, 0, 1, b"x" * 16_000), frame(frames.CONTINUATION, 0, 1, b"x" * 16_000)],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        ([frame(frames.CONTINUATION, 0, 1, b"")], ErrorCode.PROTOCOL_ERROR),
        ([frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xff\xff\xff")], ErrorCode.COMPRESSION_ERROR),
        ([frame(frames.HEADERS, frames.WITH_PRIORITY, 1, b"\0")], ErrorCode.FRAME_SIZE_ERROR),
        (["open 1", frame(frames.DATA, frames.PADDED, 1, b"\x05hi")], ErrorCode.PROTOCOL_ERROR),
        ([frame(frames.PUSH_PROMISE, 0, 1, b"")], ErrorCode.PROTOCOL_ERROR),
        ([frame(frames.PING, 0, 0, b"short")], ErrorCode.PROTOCOL_ERROR),
        ([frame(frames.SETTINGS, 0, 1, b"")], ErrorCode.PROTOCOL_ERROR),
        ([frame(frames.SETTINGS, 0, 0, b"\0\0\0")], ErrorCode.FRAME_SIZE_ERROR),
        ([frames.settings({Setting.INITIAL_WINDOW_SIZE: 1 << 31})], ErrorCode.FLOW_CONTROL_ERROR),
        ([frames.settings({Setting.MAX_FRAME_SIZE: 100})], ErrorCode.PROTOCOL_ERROR),
        ([update(0, 0)], ErrorCode.FLOW_CONTROL_ERROR),
        ([update(0, frames.WINDOW_MAX)], ErrorCode.FLOW_CONTROL_ERROR),
        ([update(1, 1)], ErrorCode.PROTOCOL_ERROR),
        ([frame(frames.WINDOW_UPDATE, 0, 0, b"\0")], ErrorCode.FRAME_SIZE_ERROR),
        ([frames.rst_stream(1, ErrorCode.CANCEL)], ErrorCode.PROTOCOL_ERROR),
        ([frame(frames.RST_STREAM, 0, 1, b"")], ErrorCode.FRAME_SIZE_ERROR),
        ([b"\xff\xff\xff\0\0\0\0\0\1"], ErrorCode.FRAME_SIZE_ERROR),
    ],
)
def test_a_peer_that_breaks_a_rule_is_told_why_and_left(sent: list[bytes | str], code: ErrorCode) -> None:
    peer = Peer()
    peer.send(*(part if isinstance(part, bytes) else peer.open(int(part.split()[1])) for part in sent))
    assert peer.error() is code
    assert peer.send(peer.open(9)) == []


def test_a_grant_beyond_all_bounds_ends_only_its_stream() -> None:
    peer = Peer()
    assert peer.send(peer.open(1), update(1, frames.WINDOW_MAX))[-1] == Closed(1)
    assert peer.got()[-1][0] == frames.RST_STREAM
    assert not peer.connection.failed


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nXX"])
def test_who_does_not_speak_http2_is_left_at_once(greeting: bytes) -> None:
    connection = Connection(10)
    assert connection.receive(greeting) == []
    assert connection.failed
