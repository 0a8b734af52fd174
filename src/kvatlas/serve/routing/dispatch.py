"""From a request to where it goes: read, tokenized within its budget, admitted, decided. Both front doors do this alike."""

from __future__ import annotations

import time
from collections.abc import Collection, Container, Mapping
from typing import Protocol

import msgspec

from kvatlas.errors import RouteError, TokenizationError, TokenizationReason
from kvatlas.observe.traces import Traces
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import Endpoint
from kvatlas.route.outcome import Outcome
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Flight, Router
from kvatlas.serve.prompts import named
from kvatlas.serve.routing.asked import DESTINATION, DP_RANK, ENCODERS, PREFILLER, REQUEST_ID, Asked, read_request, request_id
from kvatlas.serve.routing.load_headers import LoadHeaders
from kvatlas.serve.routing.metrics import RoutingMetrics
from kvatlas.serve.routing.spans import UNTRACED, RequestSpan, begin
from kvatlas.tokens.tokenization import Tokenization, Waiting


class Admission(Protocol):
    """Says when a request may be decided."""

    async def admit(self, request: RouteRequest, body_bytes: int) -> None:
        """Return when it may. Raises RouteError where it may not; cancelling gives its place up."""
        ...

    def changed(self) -> None:
        """A request ended, or an engine said something: who waits may get a turn."""
        ...


class RoutingBounds(msgspec.Struct, frozen=True):
    """What a request may cost before it is decided."""

    tokens_timeout_s: float = 0.4
    """How long its tokens may take; without them it is routed by load and history."""
    priorities: Mapping[str, int] = {}
    """By objective (header x-llm-d-inference-objective)."""
    tokenizers: Container[str] = frozenset()
    """Models that have a tokenizer of their own, whatever else they are called."""
    aliases: Mapping[str, str] = {}
    """Other names of models: alias to name."""
    orca: bool = False
    """Ask engines to tell their load with answers."""


class Dispatcher:
    """Turns requests into trips. Runs in one event loop."""

    def __init__(
        self,
        router: Router,
        tokenization: Tokenization,
        admission: Admission,
        metrics: RoutingMetrics,
        bounds: RoutingBounds = RoutingBounds(),  # noqa: B008  # frozen
        traces: Traces | None = None,
    ) -> None:
        """``traces``: None where requests are not traced."""
        self.router = router
        self.metrics = metrics
        self.admission = admission
        self._tokenization = tokenization
        self._bounds = bounds
        self._traces = traces
        self.load_headers = LoadHeaders(router, metrics, ask=bounds.orca)
        waiting = tokenization.waiting
        self._waiting = Waiting(waiting.policy, waiting.budget_s, min(waiting.timeout_s, bounds.tokens_timeout_s))

    async def dispatch(self, path: str, headers: Mapping[str, str], body: bytes, subset: frozenset[str] | None = None) -> Trip:
        """Return where a request goes; from then on it counts as in flight, and the trip has to be finished.

        ``headers`` by lower-case name. Raises RequestError (400) for what cannot be routed, RouteError for what goes nowhere.
        """
        span = begin(self._traces, path, headers)
        try:
            return await self._dispatch(path, headers, body, subset, span)
        except BaseException as error:
            span.refused(error)
            raise

    async def _dispatch(
        self, path: str, headers: Mapping[str, str], body: bytes, subset: frozenset[str] | None, span: RequestSpan
    ) -> Trip:
        began_s = time.perf_counter()
        asked = read_request(path, headers, body, subset=subset, priorities=self._bounds.priorities)
        read_s = time.perf_counter()
        span.step("read")
        request = await self._with_tokens(asked)
        if request.tokens_problem is not None:
            self.metrics.without_tokens(request.tokens_problem)
        told_s = time.perf_counter()
        span.step("tokens")
        try:
            await self.admission.admit(request, len(body))
            admitted_s = time.perf_counter()
            span.step("admission")
            flight = self.router.decide(request)
        except RouteError as error:
            self.metrics.dropped(error)
            raise
        self.metrics.decided(flight.decision)
        self.metrics.stages(read_s - began_s, told_s - read_s, admitted_s - told_s, time.perf_counter() - admitted_s)
        span.decided(flight.decision)
        return Trip(self, asked, flight, span)

    async def preview(self, path: str, body: bytes) -> Decision:
        """Return where a request would go now. It is read and tokenized as any other; nothing is sent, admitted or counted.

        Raises RequestError (400) for what cannot be routed, RouteError for what would go nowhere.
        """
        asked = read_request(path, {}, body, subset=None, priorities={})
        return self.router.preview(await self._with_tokens(asked))

    def dispatch_bare(self, path: str, headers: Mapping[str, str], subset: frozenset[str] | None = None) -> Trip:
        """Return where a request goes of which no body is known (GET /v1/models): to anybody, as load would have it.

        It waits for nothing, and so needs no admission. Raises RouteError for what goes nowhere.
        """
        span = begin(self._traces, path, headers)
        request = RouteRequest(id=request_id(headers), model="", headers=headers, subset=subset)
        try:
            flight = self.router.decide(request)
        except RouteError as error:
            self.metrics.dropped(error)
            span.refused(error)
            raise
        self.metrics.decided(flight.decision)
        span.decided(flight.decision)
        return Trip(self, Asked(path=path, body=b"", request=request, prompt=None, stream=False), flight, span)

    async def _with_tokens(self, asked: Asked) -> RouteRequest:
        request = asked.request
        if asked.prompt is None:
            return request
        if not self._tokenization.configured:
            return msgspec.structs.replace(request, tokens_problem=TokenizationReason.NO_BACKEND.value)
        try:
            prompt = named(asked.prompt, self._bounds.tokenizers, self._bounds.aliases)
            told = await self._tokenization.tokens(prompt, self._waiting)
        except TokenizationError as error:
            return msgspec.structs.replace(request, tokens_problem=error.reason.value)
        return msgspec.structs.replace(
            request, token_ids=told.token_ids, tokens_complete=told.complete, multimodal=told.multimodal
        )


class Trip:
    """A request on its way to an engine and back. Has to be finished once, whatever happens."""

    def __init__(self, dispatcher: Dispatcher, asked: Asked, flight: Flight, span: RequestSpan = UNTRACED) -> None:
        self.asked = asked
        self._dispatcher = dispatcher
        self._flight = flight
        self._span = span
        self._endpoint = flight.decision.target

    @property
    def decision(self) -> Decision:
        return self._flight.decision

    def request_headers(self) -> dict[str, str]:
        """Return the headers to set on the request that is sent to the target."""
        decision = self.decision
        headers = {
            DESTINATION: ",".join(target.authority for target in decision.targets),
            REQUEST_ID: self.asked.request.id,
        }
        if decision.target.names_rank:
            headers[DP_RANK] = str(decision.target.dp_rank)
        if decision.prefill is not None:
            headers[PREFILLER] = decision.prefill.authority
        if decision.encoders:
            headers[ENCODERS] = ",".join(encoder.authority for encoder in decision.encoders)
        headers.update(self._dispatcher.load_headers.to_engine(self.asked.request.headers))
        headers.update(self._span.headers())
        return headers

    def response_headers(self, served: Endpoint | None = None) -> dict[str, str]:
        """Return the headers that plugins put on the response. ``served``: of whom, if it were not who it goes to now."""
        endpoint = self._flight.endpoint if served is None else served.name
        return self._dispatcher.router.response_headers(self.decision, endpoint)

    def body_sent(self) -> None:
        """The body is passed on and not needed any more: a long answer should not keep it in memory."""
        self.asked = msgspec.structs.replace(self.asked, body=b"", prompt=None)

    def moved(self, endpoint: Endpoint) -> None:
        """The request is sent to another endpoint instead."""
        self._dispatcher.metrics.retried()
        self._flight.moved(endpoint.name)
        self._endpoint = endpoint
        self._span.moved(endpoint.name)

    def hidden_headers(self) -> Collection[str]:
        """Return the headers of the answer that are not for the client."""
        return self._dispatcher.load_headers.hidden(self.asked.request.headers)

    def answered(self, headers: Mapping[str, str]) -> None:
        """The answer's headers came (by lower-case name)."""
        if self._dispatcher.load_headers.learn(self._endpoint, headers):
            self._dispatcher.admission.changed()

    def first_token(self, ttft_s: float) -> None:
        """The first token came, so many seconds after the request was sent."""
        self._flight.first_token(ttft_s)
        self._span.step("first token")

    def finished(self, outcome: Outcome) -> None:
        """The request ended. Later calls do nothing."""
        if self._flight.finished(outcome):
            self._dispatcher.metrics.finished(self.decision, self._flight.endpoint, outcome)
            self._span.finished(self._flight.endpoint, outcome)
            self._dispatcher.admission.changed()
