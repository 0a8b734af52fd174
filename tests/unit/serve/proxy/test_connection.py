"""An engine's answer, however its bytes are cut."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.serve.proxy.connection import BUFFER_BYTES_MAX, HEAD_BYTES_MAX, EngineConnection
from kvatlas.serve.proxy.errors import Break, UpstreamError

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class Wire(asyncio.Transport):
    """The engine's side: what was written, and whether more is wanted."""

    def __init__(self) -> None:
        self.written = b""
        self.paused = False
        self.aborted = False

    def write(self, data: object) -> None:
        self.written += cast(bytes, data)

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def abort(self) -> None:
        self.aborted = True


async def answered(pieces: list[bytes], *, close: bool = False) -> tuple[EngineConnection, bytes]:
    """Send a request, let the engine write these pieces, and read its answer."""
    connection, wire = EngineConnection(lambda _: None), Wire()
    connection.connection_made(wire)
    sending = asyncio.create_task(connection.send(b"GET / HTTP/1.1\r\n\r\n", b"", 20))
    await asyncio.sleep(0)
    assert wire.written
    for piece in pieces:
        connection.data_received(piece)
    if close:
        connection.connection_lost(None)
    await sending
    body = b""
    while piece := await connection.read(20):
        body += piece
    return connection, body


@given(st.data())
def test_an_answer_is_the_same_however_it_is_cut(data: st.DataObject) -> None:
    body = b'{"a": 1}' * 20
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7)) + b"0\r\n\r\n"
    whole = data.draw(
        st.sampled_from(
            [
                OK + b"Content-Length: %d\r\n\r\n" % len(body) + body,
                OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks,
                b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: %d\r\n\r\n" % len(body) + body,
            ]
        )
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=12)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    connection, got = asyncio.run(answered(pieces))
    assert got == body
    assert connection.status == 200
    assert (b"Content-Type", b"application/json") in connection.headers
    assert connection.reusable


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_end_as_an_answer_or_an_error(noise: bytes) -> None:
    async def run() -> None:
        connection = EngineConnection(lambda _: None)
        connection.connection_made(Wire())
        sending = asyncio.create_task(connection.send(b"", b"", 20))
        await asyncio.sleep(0)
        connection.data_received(noise)
        connection.connection_lost(None)
        with pytest.raises(UpstreamError) as raised:
            await sending
        assert raised.value.how in (Break.GARBAGE, Break.RESET)

    asyncio.run(run())


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    connection, body = await answered([OK + b"\r\n", b"half", b" whole"], close=True)
    assert body == b"half whole"
    assert not connection.reusable


@pytest.mark.parametrize("framing", [b"Content-Length: 10\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_an_answer_that_is_cut_is_an_error(framing: bytes) -> None:
    with pytest.raises(UpstreamError) as raised:
        await answered([OK + framing + b"\r\n", b"4\r\nhalf"], close=True)
    assert raised.value.how is Break.RESET


async def test_a_connection_that_says_close_or_more_than_was_asked_is_not_used_again() -> None:
    connection, _ = await answered([OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n"])
    assert not connection.reusable
    connection, _ = await answered([OK + b"Content-Length: 0\r\n\r\n" + OK])
    assert not connection.reusable
    connection, _ = await answered([OK + b"Content-Length: 0\r\n\r\n"])
    assert connection.reusable
    connection.data_received(OK)
    assert not connection.reusable


async def test_headers_without_end_are_refused() -> None:
    with pytest.raises(UpstreamError) as raised:
        await answered([OK + b"X: ", b"a" * HEAD_BYTES_MAX])
    assert raised.value.how is Break.GARBAGE


async def test_an_engine_is_read_no_further_while_its_answer_is_not_taken() -> None:
    connection, wire = EngineConnection(lambda _: None), Wire()
    connection.connection_made(wire)
    sending = asyncio.create_task(connection.send(b"", b"", 20))
    await asyncio.sleep(0)
    connection.data_received(OK + b"Content-Length: %d\r\n\r\n" % (4 * BUFFER_BYTES_MAX))
    await sending
    connection.data_received(b"x" * BUFFER_BYTES_MAX)
    assert not wire.paused
    connection.data_received(b"x")
    assert wire.paused
    assert len(await connection.read(20)) == BUFFER_BYTES_MAX + 1
    assert not wire.paused


async def test_silence_is_an_error_and_ends_the_connection() -> None:
    connection, wire = EngineConnection(lambda _: None), Wire()
    connection.connection_made(wire)
    with pytest.raises(UpstreamError) as raised:
        await connection.send(b"", b"", 0.001)
    assert raised.value.how is Break.SILENT
    assert wire.aborted
