"""One routed request from its decision to the end of its answer: sent where it should go, passed on as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from kvatlas.discovery.health import Health
from kvatlas.route.endpoint import Endpoint
from kvatlas.route.outcome import End, Outcome
from kvatlas.serve.proxy.errors import Break, ProxyError, UpstreamError, unanswered
from kvatlas.serve.proxy.headers import Pair, to_client
from kvatlas.serve.proxy.retries import RetryBudget, Tried
from kvatlas.serve.proxy.upstream import EngineAnswer, Upstream
from kvatlas.serve.routing.answers import AnswerReader, Usage
from kvatlas.serve.routing.asked import REQUEST_ID
from kvatlas.serve.routing.dispatch import Trip

BROKEN_OFF = b'data: {"error":{"message":"the engine broke off","type":"server_error","param":null,"code":502}}\n\n'
"""The last event of a stream that its engine broke off. No [DONE] follows, and the connection is closed."""


UNTIMED_BYTES_MAX = 32 << 10
"""A piece up to this length goes into an empty buffer without waiting, and so needs no time limit."""


class ExchangeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one request may take. Times in seconds."""

    retries_max: int
    client_s: float
    """For its client to take a piece of the answer."""
    request_s: float
    """From its decision to the end of the answer."""


class Exchange:
    """Made for one trip; :meth:`run` is called once."""

    def __init__(
        self,
        trip: Trip,
        upstream: Upstream,
        health: Health,
        budget: RetryBudget,
        limits: ExchangeLimits,
        target: str,
        headers_to: Callable[[Endpoint], list[Pair]],
    ) -> None:
        """``target``: path and query; ``headers_to``: the request's headers as an endpoint gets them."""
        self._trip = trip
        self._upstream = upstream
        self._health = health
        self._budget = budget
        self._limits = limits
        self._target = target
        self._headers_to = headers_to
        self._sent_s = 0.0
        self._ttft_s: float | None = None
        self._reader: AnswerReader | None = None
        self._response: web.StreamResponse | None = None
        """What its client has begun to get."""
        self._end = End.CLIENT_GONE  # unless something else becomes known: then the client went away, or the proxy stops
        self.endpoint = trip.decision.target
        """Who has the request now."""

    async def run(self, request: web.BaseRequest, explained: Callable[[], Mapping[str, str]]) -> web.StreamResponse:
        """Return the answer; what is no short one is sent by then. Finishes the trip. Raises ProxyError where nobody answered.

        ``explained``: headers to put on the answer.
        """
        try:
            async with asyncio.timeout(self._limits.request_s):
                answer = await self._send()
                try:
                    headers = CIMultiDict(to_client(answer.headers))
                    for name in self._trip.answered(headers):
                        headers.popall(name, None)
                    headers[REQUEST_ID] = self._trip.asked.request.id
                    headers.update(self._trip.response_headers())
                    headers.update(explained())
                    return await self._pass_on(request, answer, headers)
                finally:
                    self._upstream.release(self.endpoint, answer)
        except UpstreamError as error:
            self._end = End.UNREACHABLE
            raise unanswered(error, self.endpoint.name) from error
        except TimeoutError:
            self._end = End.ENGINE_ERROR
            limit = f"within proxy.requestTimeout ({self._limits.request_s:g} s)"
            if self._response is None:
                raise ProxyError(504, f"no answer {limit}", "ask for less, or let it wait longer") from None
            return _cut(request, self._response)
        finally:
            self._trip.finished(self._outcome())

    async def _send(self) -> EngineAnswer:
        """Send the request to its target, or to whom it can be sent instead; return where an answer begins."""
        self._budget.request()
        tried = Tried(self._trip.decision, self._health.healthy)
        endpoint = tried.first()
        while True:
            if endpoint.name != self.endpoint.name:
                self._trip.moved(endpoint)
                self.endpoint = endpoint
            try:
                answer = await self._attempt(endpoint)
            except UpstreamError as error:
                another = None if error.how is Break.SILENT else self._another(tried, error)
                if another is None:
                    raise
            else:
                another = self._another(tried) if answer.status == 503 else None
                if another is None:
                    return answer
                self._upstream.release(endpoint, answer)
            endpoint = another

    def _another(self, tried: Tried, error: UpstreamError | None = None) -> Endpoint | None:
        """Return who gets the request after the one it was sent to failed; None: nobody."""
        another = tried.next(unreachable=error is not None and error.how is Break.NO_CONNECTION)
        return another if tried.count <= self._limits.retries_max and another is not None and self._budget.take() else None

    async def _attempt(self, endpoint: Endpoint) -> EngineAnswer:
        headers = self._headers_to(endpoint)
        self._sent_s = time.perf_counter()
        turn = self._health.enter(endpoint.name)
        if turn is None:  # nobody is healthy
            return await self._upstream.send(endpoint, "POST", self._target, headers, self._trip.asked.body)
        with turn:
            try:
                answer = await self._upstream.send(endpoint, "POST", self._target, headers, self._trip.asked.body)
            except UpstreamError as error:
                if error.how is not Break.ALL_IN_USE:
                    turn.failed()
                raise
            if answer.status < 500:
                turn.succeeded()
            elif answer.status != 503:
                turn.failed()
            return answer

    async def _pass_on(self, request: web.BaseRequest, answer: EngineAnswer, headers: CIMultiDict[str]) -> web.StreamResponse:
        """Pass an answer on, each piece as it comes."""
        events = headers.get("Content-Type", "").startswith("text/event-stream")
        self._reader = AnswerReader(stream=events)
        if answer.complete:  # all of it is here: it goes out at once
            body = await answer.read(0.0)
            self._feed(body)
            self._end = _end(answer.status)
            return web.Response(body=body, status=answer.status, headers=headers)
        response = self._response = web.StreamResponse(status=answer.status, headers=headers)
        piece = b"\n\n"
        try:
            await response.prepare(request)
            while following := await answer.read(self._upstream.limits.idle_s):
                piece = following
                self._feed(piece)
                await self._write(request, response, piece)
        except UpstreamError:
            self._end = End.ENGINE_ERROR
            self._tell_health()
            if events and piece.endswith(b"\n\n"):
                with contextlib.suppress(ConnectionError):
                    await self._write(request, response, BROKEN_OFF)
            request.protocol.force_close()  # once what was written is sent
        except ConnectionError:
            return _cut(request, response)
        else:
            self._end = _end(answer.status)
        return response

    async def _write(self, request: web.BaseRequest, response: web.StreamResponse, piece: bytes) -> None:
        """Hand a piece to the client's answer. Raises ConnectionError where that is gone, or takes nothing for too long."""
        transport = request.transport
        if transport is not None and len(piece) <= UNTIMED_BYTES_MAX and not transport.get_write_buffer_size():
            await response.write(piece)
            return
        try:
            async with asyncio.timeout(self._limits.client_s):
                await response.write(piece)
        except TimeoutError:
            raise ConnectionResetError("the client takes nothing") from None

    def _feed(self, piece: bytes) -> None:
        assert self._reader is not None
        if self._reader.feed(piece):
            self._ttft_s = time.perf_counter() - self._sent_s
            self._trip.first_token(self._ttft_s)

    def _tell_health(self) -> None:
        """Count an answer that was broken off as another failure: the turn has ended with the answer's head."""
        turn = self._health.enter(self.endpoint.name)
        if turn is not None:
            with turn:
                turn.failed()

    def _outcome(self) -> Outcome:
        usage = Usage() if self._reader is None else self._reader.usage()
        if self._end is End.CLIENT_GONE and self._reader is not None and self._reader.said_done:
            self._end = End.DONE
        return Outcome(
            end=self._end,
            ttft_s=self._ttft_s if self._end in (End.DONE, End.CLIENT_GONE) else None,
            duration_s=None if self._reader is None else time.perf_counter() - self._sent_s,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.output_tokens,
        )


def _cut(request: web.BaseRequest, response: web.StreamResponse) -> web.StreamResponse:
    """Close a client's answer at once, so that it sees that its answer is not whole."""
    if request.transport is not None:
        request.transport.abort()
    return response


def _end(status: int) -> End:
    if status < 400:
        return End.DONE
    return End.REFUSED if status < 500 else End.ENGINE_ERROR
