"""How answers leave an embedded engine: whole or piece by piece as tokens come, or not at all where a fault says so."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from aiohttp import web

from kvatlas.sim.live.answers import Answer, failure
from kvatlas.sim.live.engine import End, Generation
from kvatlas.sim.live.faults import Faults

JSON = "application/json"
RETRY = {"Retry-After": "1"}

_ENDED = {
    End.STOPPED: (503, "the engine stops", "ServiceUnavailable"),
    End.REFUSED: (400, "it does not fit into the engine's memory", "BadRequestError"),
}


def refused(status: int, message: str, kind: str, param: str | None = None) -> web.Response:
    """Return an error as an answer; a busy engine asks to be tried again."""
    headers = RETRY if status in (429, 503) else None
    return web.Response(status=status, body=failure(status, message, kind, param), content_type=JSON, headers=headers)


class Sender:
    """Sends the answer to one request, as far as no fault comes between."""

    def __init__(self, request: web.Request, faults: Faults) -> None:
        self._request = request
        self._faults = faults
        self._draw()

    async def fail_early(self) -> web.Response | None:
        """Let a request fail before its answer; None where it does not."""
        while self._fault is not None and self._fault.kind == "hang":
            await self._stalled()
        fault = self._fault
        if fault is not None and fault.kind == "reset":
            await self._cut()
        if fault is not None and fault.kind == "status":
            return refused(fault.status, f"a fault of kind status {fault.status} is set", "InjectedFault")
        return None

    async def whole(self, generation: Generation, answer: Answer, headers: Callable[[], dict[str, str]]) -> web.StreamResponse:
        """Send an answer in one piece, once it is finished. ``headers``: further ones, as they are then."""
        while generation.end is None:
            await generation.wait(generation.output_tokens)
        if generation.end is not End.FINISHED:
            return refused(*_ENDED[generation.end])
        body, more = answer.whole(), headers()
        if self._breaks_after == math.inf:
            return web.Response(body=body, content_type=JSON, headers=more)
        response = web.StreamResponse(headers={"Content-Type": JSON, "Content-Length": str(len(body)), **more})
        await response.prepare(self._request)
        await response.write(body[: len(body) // 2])
        while self._breaks_after < math.inf:
            await self._break()
        await response.write(body[len(body) // 2 :])
        await response.write_eof()
        return response

    async def stream(self, generation: Generation, answer: Answer) -> web.StreamResponse:
        """Send an answer as server-sent events, its tokens as they come."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})
        await response.prepare(self._request)
        told = 0
        while generation.end is None or told < generation.produced or told >= self._breaks_after:
            if told >= self._breaks_after:
                await self._break()
                continue
            await generation.wait(told)
            end = int(min(generation.produced, self._breaks_after))
            if end > told:
                await response.write((b"" if told else answer.begin()) + answer.piece(told, end))
                told = end
        if generation.end is End.FINISHED:
            await response.write(answer.last())
        else:
            await response.write(b"data: " + failure(*_ENDED[generation.end]) + b"\n\n")
        await response.write_eof()
        return response

    @property
    def _breaks_after(self) -> float:
        """Tokens of a stream that are told before it is broken off."""
        return self._fault.after if self._fault is not None and self._fault.midway else math.inf

    async def _break(self) -> None:
        """Break an answer off. Returns where a stall is over."""
        if self._fault is not None and self._fault.kind == "cut":
            await self._cut()
        await self._stalled()

    async def _stalled(self) -> None:
        await self._over.wait()
        self._draw()

    def _draw(self) -> None:
        self._fault = self._faults.of_request()
        self._over = self._faults.over

    async def _cut(self) -> None:
        """Cut the connection. Does not return: this request is cancelled for that."""
        if self._request.transport is not None:
            self._request.transport.abort()
        await asyncio.Event().wait()
