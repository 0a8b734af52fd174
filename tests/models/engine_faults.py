"""What can go wrong with the test engine's answers."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
from aiohttp import web

from tests.models.engine_answers import error

JSON = "application/json"


class Fault(msgspec.Struct, frozen=True):
    """What goes wrong: before the first byte (``hang``, ``reset``, ``status``, ``garbage``), else after ``after`` pieces."""

    kind: Literal["hang", "reset", "status", "garbage", "hang-midway", "close-midway", "slow"]
    times: int | None = None
    """With so many requests; None: until it is ended."""
    status: int = 503
    after: int = 1
    slow_s: float = 0.1
    """``slow``: time before each byte of the pieces that come after."""
    path: str = "/v1/"
    """Only with paths that begin so."""


async def fail_early(request: web.Request, fault: Fault) -> web.Response | None:
    """Let a request fail before its answer; None where the fault comes later."""
    transport = request.transport
    if fault.kind == "status":
        return failed(fault.status, f"fault of the test: {fault.status}")
    if fault.kind == "reset":
        _abort(transport)
    if fault.kind == "garbage" and transport is not None:
        transport.write(b"\x00\xffSSH-2.0-this is no HTTP\r\n\r\n")  # type: ignore[attr-defined]
        transport.close()
    if fault.kind in {"hang", "reset", "garbage"}:
        await _client_gone()
    return None


class PieceWriter:
    """Writes an answer's body piece by piece, until its fault comes."""

    def __init__(self, request: web.Request, response: web.StreamResponse, fault: Fault | None) -> None:
        self._request = request
        self._response = response
        self._fault = fault
        self._pieces = 0

    async def write(self, piece: bytes) -> None:
        fault = self._fault
        if fault is None or self._pieces < fault.after:
            await self._response.write(piece)
        elif fault.kind == "slow":
            for i in range(len(piece)):
                await asyncio.sleep(fault.slow_s)
                await self._response.write(piece[i : i + 1])
        else:
            if fault.kind == "close-midway":
                _abort(self._request.transport)
            await _client_gone()
        self._pieces += 1


def failed(status: int, message: str) -> web.Response:
    headers = {"Retry-After": "1"} if status == 503 else None
    return web.Response(status=status, body=error(status, message), content_type=JSON, headers=headers)


async def _client_gone() -> None:
    """Wait for the client to go away: then the request is cancelled."""
    await asyncio.Event().wait()


def _abort(transport: asyncio.BaseTransport | None) -> None:
    if transport is not None:
        transport.abort()  # type: ignore[attr-defined]
