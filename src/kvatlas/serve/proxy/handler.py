"""One client's request, from its headers to the last byte of its answer, in the order in which it happens.

admitted (path, token, concurrency) -> read (within limits) -> dispatched (decided) -> exchanged with an engine. Whatever fails
on the way is answered in one form.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from kvatlas.config.proxy import ProxySettings
from kvatlas.discovery.health import Health
from kvatlas.errors import RequestError, RouteError, StoppingError
from kvatlas.observe.logs import get_logger
from kvatlas.route.endpoint import Endpoint
from kvatlas.serve.proxy.call import ClientCall, Reply, Sent, Stack
from kvatlas.serve.proxy.errors import ProxyError, as_refusal
from kvatlas.serve.proxy.exchange import Exchange, ExchangeLimits
from kvatlas.serve.proxy.headers import EXPLAIN
from kvatlas.serve.proxy.metrics import ProxyMetrics
from kvatlas.serve.proxy.models import Models
from kvatlas.serve.proxy.retries import RetryBudget
from kvatlas.serve.routing.asked import DESTINATION, DP_RANK, REQUEST_ID, request_id
from kvatlas.serve.routing.dispatch import Dispatcher, Trip
from kvatlas.serve.token import TokenCheck

JSON = "application/json"

ROUTED = frozenset(
    {
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/score", "/v1/rerank"),
        *("/v2/rerank", "/score", "/rerank", "/pooling", "/classify", "/v1/messages", "/generate"),
        *("/tokenize", "/detokenize", "/v1/completions/render", "/v1/chat/completions/render"),
    }
)
"""Paths that are routed: OpenAI's API, and what vLLM and SGLang have beside it."""

OPEN = frozenset({"/health", "/healthz", "/readyz"})
"""Paths that need no token."""

_log = get_logger(__name__)


class ProxyHandler:
    """Answers requests. Runs in one event loop."""

    def __init__(
        self, dispatcher: Dispatcher, health: Health, stack: Stack, settings: ProxySettings, metrics: ProxyMetrics
    ) -> None:
        self.draining = False
        """Whether the proxy stops: nothing new is taken."""
        self.in_progress = 0
        self._dispatcher = dispatcher
        self._health = health
        self._settings = settings
        self._metrics = metrics
        self._token = TokenCheck(settings.token)
        self._engine_authorization = None if settings.engine_token is None else f"Bearer {settings.engine_token}"
        self._budget = RetryBudget(settings.retry_share)
        self._models = Models(stack, lambda: dispatcher.router.endpoints, health.healthy, settings.models_ttl)
        self._limits = ExchangeLimits(retries_max=settings.retries_max, request_s=settings.request_timeout)

    async def handle(self, call: ClientCall) -> Reply | None:
        """Answer a request; None where an engine's answer was passed on."""
        headers = call.headers
        headers[REQUEST_ID] = _visible(request_id(headers))
        try:
            answered = await self._answer(call)
        except (ProxyError, RequestError, RouteError) as error:
            answered = _refused(error, headers)
        except asyncio.CancelledError:
            self._metrics.cut()
            raise
        except Exception:
            _log.exception("a request failed inside", path=call.path[:200], request_id=headers[REQUEST_ID])
            answered = _refused(RuntimeError(), headers)
        if isinstance(answered, int):
            self._metrics.answered(answered)
            return None
        self._metrics.answered(answered.status)
        return msgspec.structs.replace(answered, close=True) if self.draining else answered

    async def _answer(self, call: ClientCall) -> Reply | int:
        """Return the reply, or the status of an answer that was passed on."""
        path = call.path
        if call.problem is not None:
            raise ProxyError(400, f"the request is framed in two ways: {call.problem}", "send one Content-Length", close=True)
        if path in OPEN:
            return self._health_answer(path)
        if not self._token.allows(call.headers.get("authorization")):
            raise ProxyError(
                401, "the bearer token is missing or wrong", "send the header Authorization: Bearer TOKEN", close=True
            )
        if path in ROUTED:
            if call.method != "POST":
                raise ProxyError(405, f"{path} takes POST", "send it with a JSON body")
            return await self._routed(call)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            if call.method != "GET":
                raise ProxyError(405, f"{path} takes GET", "send it without a body", close=True)
            return await self._model_list(path, call.headers)
        raise ProxyError(404, f"there is no {path[:200]}", "see /v1/models and /v1/chat/completions", close=True)

    async def _routed(self, call: ClientCall) -> int:
        if self.draining:
            raise StoppingError()
        if self.in_progress >= self._settings.concurrency_max:
            problem = f"{self.in_progress} requests are in progress (proxy.concurrencyMax)"
            raise ProxyError(503, problem, "send it again later", reason="rejected-saturated", close=True)
        self.in_progress += 1
        try:
            _check_kind(call.headers)
            body = await call.body(self._settings.body_bytes_max)
            trip = await self._dispatcher.dispatch(call.path, call.headers, body)
            exchange = Exchange(trip, self._health, self._budget, self._limits, lambda to: self._sent(call, trip, to))
            return await exchange.run(call)
        finally:
            self.in_progress -= 1

    def _sent(self, call: ClientCall, trip: Trip, endpoint: Endpoint) -> Sent:
        """Return a request as an endpoint is to get it."""
        routing = trip.request_headers()
        del routing[DESTINATION]  # it is for gateways, which choose the endpoint by it
        routing.pop(DP_RANK, None)
        if endpoint.names_rank:
            routing[DP_RANK] = str(endpoint.dp_rank)
        if self._engine_authorization is not None:
            routing["authorization"] = self._engine_authorization
        reply = {REQUEST_ID: trip.asked.request.id, **trip.response_headers()}
        if EXPLAIN in call.headers:
            reply.update(explained(trip, endpoint))
        return Sent(
            endpoint=endpoint,
            target=f"{call.path}?{call.query}" if call.query else call.path,
            body=trip.asked.body,
            routing=routing,
            reply=reply,
            hidden=trip.hidden_headers(),
        )

    async def _model_list(self, path: str, headers: Mapping[str, str]) -> Reply:
        authorization = self._engine_authorization
        if authorization is None and not self._token.needed:
            authorization = headers.get("authorization")
        own = authorization == self._engine_authorization
        models = await self._models.get({} if authorization is None else {"authorization": authorization}, keep=own)
        if path == "/v1/models":
            return _json(msgspec.json.encode(models), {REQUEST_ID: headers[REQUEST_ID]})
        name = path.removeprefix("/v1/models/")
        for model in models.data:
            if model.get("id") == name:
                return _json(msgspec.json.encode(model))
        raise ProxyError(404, f"no engine serves the model {name[:200]}", "see GET /v1/models", param="model")

    def _health_answer(self, path: str) -> Reply:
        """/healthz: whether the process serves. /readyz and /health: whether requests can go anywhere."""
        if path == "/healthz":
            return _json(b'{"status":"ok"}')
        if self.draining:
            raise StoppingError()
        if not any(self._health.healthy(endpoint.name) for endpoint in self._dispatcher.router.endpoints):
            raise ProxyError(503, "no engine is in rotation", "see GET /v1/endpoints", reason="rejected-no-endpoints")
        return _json(b'{"status":"ready"}')


def explained(trip: Trip, endpoint: Endpoint) -> dict[str, str]:
    """Return headers that say where a request went, and what was held there of its prompt."""
    told: dict[str, str] = {"x-kvatlas-endpoint": endpoint.name}
    found = trip.decision.first_matches
    if found is not None:
        match = found.of(endpoint.name)
        told["x-kvatlas-matched-tokens"] = str(match.tokens)
        told["x-kvatlas-matched-by"] = match.source.value if match.tokens else "none"
    return told


def _check_kind(headers: Mapping[str, str]) -> None:
    """Raise ProxyError (415) for a body that is no plain JSON by its headers."""
    kind = headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if kind != JSON and not kind.endswith("+json"):
        raise ProxyError(415, f"a body of type {kind[:80]} is not routed", f"send JSON with Content-Type: {JSON}", close=True)
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ProxyError(415, f"a body encoded as {coding[:80]} is not routed", "send it without Content-Encoding", close=True)


def _refused(error: Exception, headers: Mapping[str, str]) -> Reply:
    refusal = as_refusal(error)
    told = {**dict(refusal.headers), REQUEST_ID: headers[REQUEST_ID]}
    if refusal.status == 401:
        told["www-authenticate"] = 'Bearer realm="kvatlas"'
    # what is left of a body is not read
    return Reply(status=refusal.status, body=refusal.body, headers=told, close=getattr(error, "close", False))


def _json(body: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> Reply:
    return Reply(status=200, body=body, headers={"content-type": JSON, **headers})


def _visible(text: str) -> str:
    """Return an id with what is no visible ASCII replaced."""
    return text if text.isascii() and text.isprintable() else "".join(one if "!" <= one <= "~" else "?" for one in text)
