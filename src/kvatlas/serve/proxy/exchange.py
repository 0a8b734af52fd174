"""One routed request from its decision to the end of its answer: sent where it should go, passed on as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import msgspec

from kvatlas.discovery.health import Health
from kvatlas.route.endpoint import Endpoint
from kvatlas.route.outcome import End, Outcome
from kvatlas.serve.proxy.call import ClientCall, Passed, PassEnd, Sent
from kvatlas.serve.proxy.errors import Break, ProxyError, UpstreamError, unanswered
from kvatlas.serve.proxy.retries import RetryBudget, Tried
from kvatlas.serve.routing.dispatch import Trip
from kvatlas.tokens.remote.breaker import Turn

BUSY = 503


class ExchangeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one request may take."""

    retries_max: int
    request_s: float
    """From its decision to the end of the answer."""


class Exchange:
    """Made for one trip; :meth:`run` is called once. Watches the answer while it passes."""

    def __init__(
        self, trip: Trip, health: Health, budget: RetryBudget, limits: ExchangeLimits, to: Callable[[Endpoint], Sent]
    ) -> None:
        """``to``: the request as an endpoint is to get it."""
        self._trip = trip
        self._health = health
        self._budget = budget
        self._limits = limits
        self._to = to
        self._turn: Turn | None = None
        self._status: int | None = None
        """Of the answer that is passed on, or held back."""
        self._ttft_s: float | None = None
        self._passed: Passed | None = None
        self._end = End.CLIENT_GONE  # unless something else becomes known: then the client went away, or the proxy stops
        self.endpoint = trip.decision.target
        """Who has the request now."""

    async def run(self, call: ClientCall) -> int:
        """Pass an answer on to its end; return its status. Finishes the trip. Raises ProxyError where nobody answered."""
        try:
            async with asyncio.timeout(self._limits.request_s):
                self._passed = await self._send(call)
            self._conclude(self._passed)
        except UpstreamError as error:
            self._end = End.UNREACHABLE
            raise unanswered(error, self.endpoint.name) from error
        except TimeoutError:
            self._end = End.ENGINE_ERROR
            if self._status is None:
                limit = f"within proxy.requestTimeout ({self._limits.request_s:g} s)"
                raise ProxyError(504, f"no answer {limit}", "ask for less, or let it wait longer") from None
            call.cut()
        finally:
            self._trip.finished(self._outcome())
        assert self._status is not None
        return self._status

    def answered(self, status: int, headers: Mapping[str, str]) -> None:
        self._status = status
        if self._turn is not None and status != BUSY:
            if status < 500:
                self._turn.succeeded()
            else:
                self._turn.failed()
        self._trip.answered(headers)

    def first_token(self, ttft_s: float) -> None:
        self._ttft_s = ttft_s
        self._trip.first_token(ttft_s)

    def left(self, passed: Passed) -> None:
        self._passed = passed

    async def _send(self, call: ClientCall) -> Passed:
        """Send the request to its target, or to whom it can be sent instead; return when an answer has passed."""
        self._budget.request()
        tried = Tried(self._trip.decision, self._health.healthy)
        endpoint = tried.first()
        while True:
            if endpoint.name != self.endpoint.name:
                self._trip.moved(endpoint)
                self.endpoint = endpoint
            try:
                passed = await self._attempt(call, endpoint)
            except UpstreamError as error:
                another = None if error.how is Break.SILENT else self._another(tried, error)
                if another is None:
                    raise
            else:
                if passed is not None:
                    return passed
                another = self._another(tried)
                if another is None:
                    return await call.pass_held()
            self._status = None
            endpoint = another

    def _another(self, tried: Tried, error: UpstreamError | None = None) -> Endpoint | None:
        """Return who gets the request after the one it was sent to failed; None: nobody."""
        another = tried.next(unreachable=error is not None and error.how is Break.NO_CONNECTION)
        return another if tried.count <= self._limits.retries_max and another is not None and self._budget.take() else None

    async def _attempt(self, call: ClientCall, endpoint: Endpoint) -> Passed | None:
        sent = self._to(endpoint)
        self._turn = self._health.enter(endpoint.name)
        if self._turn is None:  # nobody is healthy
            return await call.forward(sent, self)
        with self._turn as turn:
            try:
                return await call.forward(sent, self)
            except UpstreamError as error:
                if error.how is not Break.ALL_IN_USE:
                    turn.failed()
                raise

    def _conclude(self, passed: Passed) -> None:
        assert self._status is not None
        if passed.end is PassEnd.WHOLE:
            self._end = _end(self._status)
        elif passed.end is PassEnd.BROKEN:
            self._end = End.ENGINE_ERROR
            self._tell_health()

    def _tell_health(self) -> None:
        """Count an answer that was broken off as another failure: its turn told of the answer's head."""
        turn = self._health.enter(self.endpoint.name)
        if turn is not None:
            with turn:
                turn.failed()

    def _outcome(self) -> Outcome:
        passed = self._passed
        if self._end is End.CLIENT_GONE and passed is not None and passed.said_done:
            self._end = End.DONE
        if passed is None:
            return Outcome(end=self._end, ttft_s=self._ttft_s if self._end is End.CLIENT_GONE else None)
        return Outcome(
            end=self._end,
            ttft_s=self._ttft_s if self._end in (End.DONE, End.CLIENT_GONE) else None,
            duration_s=passed.took_s,
            prompt_tokens=passed.usage.prompt_tokens,
            cached_tokens=passed.usage.cached_tokens,
            output_tokens=passed.usage.output_tokens,
        )


def _end(status: int) -> End:
    if status < 400:
        return End.DONE
    return End.REFUSED if status < 500 else End.ENGINE_ERROR
