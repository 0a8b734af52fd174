"""A server that answers as no engine does: with no HTTP, byte by byte, or as much as anybody takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web
from aiohttp.test_utils import TestServer

EVENT = b'data: {"choices": [{"index": 0, "text": "%s"}]}\n\n' % (b"x" * 100)
FLOOD_BYTES = 40 << 20
"""Kernels may hold half of them."""
TEXT = "word " * 400_000


class OddServer:
    """What was asked of it, and what it said."""

    def __init__(self) -> None:
        self.host = "127.0.0.1"
        self.port = 0
        self.bodies: list[bytes] = []
        self.bytes_sent = 0
        self.ended = asyncio.Event()
        """Set once an answer is over, also where its client went away."""

    @property
    def authority(self) -> str:
        return f"{self.host}:{self.port}"


Answer = Callable[[OddServer, web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def odd_server(answer: Answer) -> AsyncIterator[OddServer]:
    """Answer every request so for as long as the block lasts."""
    one = OddServer()

    async def handle(request: web.Request) -> web.StreamResponse:
        one.bodies.append(await request.read())
        try:
            return await answer(one, request)
        finally:
            one.ended.set()

    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", handle)
    async with TestServer(app) as server:
        assert server.port is not None
        one.port = server.port
        yield one


async def garbage(_one: OddServer, request: web.Request) -> web.StreamResponse:
    """Answer with no HTTP."""
    assert request.transport is not None
    request.transport.write(b"\x00\xffSSH-2.0-this is no HTTP\r\n\r\n")  # type: ignore[attr-defined]
    request.transport.close()
    return web.Response()


async def long_text(_one: OddServer, _request: web.Request) -> web.StreamResponse:
    return web.json_response({"choices": [{"index": 0, "text": TEXT}]})


async def byte_by_byte(_one: OddServer, request: web.Request) -> web.StreamResponse:
    body = msgspec.json.encode({"choices": [{"index": 0, "text": "a few words"}]})
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(body))})
    await response.prepare(request)
    for byte in body:
        await asyncio.sleep(0)
        await response.write(bytes([byte]))
    return response


async def flood(one: OddServer, request: web.Request) -> web.StreamResponse:
    """Stream as fast as it is taken."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    while one.bytes_sent < FLOOD_BYTES:
        await response.write(EVENT)
        one.bytes_sent += len(EVENT)
    await response.write(b"data: [DONE]\n\n")
    return response
