"""One client's request, from its headers to the last byte of its answer, in the order in which it happens.

admitted (path, token, concurrency) -> read (within limits) -> dispatched (decided) -> exchanged with an engine. Whatever fails
on the way is answered in one form.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

import msgspec
from aiohttp import web

from kvatlas.config.proxy import ProxySettings
from kvatlas.discovery.health import Health
from kvatlas.errors import RequestError, RouteError, StoppingError
from kvatlas.observe.logs import get_logger
from kvatlas.route.endpoint import Endpoint
from kvatlas.serve.proxy.errors import ProxyError, as_refusal
from kvatlas.serve.proxy.exchange import Exchange, ExchangeLimits
from kvatlas.serve.proxy.headers import EXPLAIN, Client, Pair, by_name, framing_problem, to_engine
from kvatlas.serve.proxy.metrics import ProxyMetrics
from kvatlas.serve.proxy.models import Models
from kvatlas.serve.proxy.retries import RetryBudget
from kvatlas.serve.proxy.upstream import Upstream
from kvatlas.serve.routing.asked import DESTINATION, DP_RANK, REQUEST_ID, request_id
from kvatlas.serve.routing.dispatch import Dispatcher, Trip
from kvatlas.serve.routing.explain import first_matches
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
        self, dispatcher: Dispatcher, health: Health, upstream: Upstream, settings: ProxySettings, metrics: ProxyMetrics
    ) -> None:
        self.draining = False
        """Whether the proxy stops: nothing new is taken."""
        self.in_progress = 0
        self._dispatcher = dispatcher
        self._health = health
        self._upstream = upstream
        self._settings = settings
        self._metrics = metrics
        self._token = TokenCheck(settings.token)
        self._engine_authorization = None if settings.engine_token is None else f"Bearer {settings.engine_token}"
        self._budget = RetryBudget(settings.retry_share)
        self._models = Models(upstream, lambda: dispatcher.router.endpoints, health.healthy, settings.models_ttl)
        self._limits = ExchangeLimits(
            retries_max=settings.retries_max, client_s=settings.client_timeout, request_s=settings.request_timeout
        )

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request."""
        headers = by_name(request.raw_headers)
        headers[REQUEST_ID] = _visible(request_id(headers))
        try:
            response = await self._answer(request, headers)
        except (ProxyError, RequestError, RouteError) as error:
            response = _refused(error, headers)
        except asyncio.CancelledError:
            self._metrics.cut()
            raise
        except Exception:
            _log.exception("a request failed inside", path=request.rel_url.raw_path[:200], request_id=headers[REQUEST_ID])
            response = _refused(RuntimeError(), headers)
        if self.draining:
            response.force_close()
        self._metrics.answered(response.status)
        return response

    async def _answer(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        path = request.rel_url.raw_path
        problem = framing_problem(request.raw_headers)
        if problem is not None:
            raise ProxyError(400, f"the request is framed in two ways: {problem}", "send one Content-Length", close=True)
        if path in OPEN:
            return self._health_answer(path)
        if not self._token.allows(headers.get("authorization")):
            raise ProxyError(
                401, "the bearer token is missing or wrong", "send the header Authorization: Bearer TOKEN", close=True
            )
        if path in ROUTED:
            if request.method != "POST":
                raise ProxyError(405, f"{path} takes POST", "send it with a JSON body")
            return await self._routed(request, path, headers)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            if request.method != "GET":
                raise ProxyError(405, f"{path} takes GET", "send it without a body", close=True)
            return await self._model_list(path, headers)
        raise ProxyError(404, f"there is no {path[:200]}", "see /v1/models and /v1/chat/completions", close=True)

    async def _routed(self, request: web.BaseRequest, path: str, headers: dict[str, str]) -> web.StreamResponse:
        if self.draining:
            raise StoppingError()
        if self.in_progress >= self._settings.concurrency_max:
            problem = f"{self.in_progress} requests are in progress (proxy.concurrencyMax)"
            raise ProxyError(503, problem, "send it again later", reason="rejected-saturated", close=True)
        self.in_progress += 1
        try:
            body = await self._body(request, headers)
            trip = await self._dispatcher.dispatch(path, headers, body)
            headers_to = partial(self._engine_headers, request, trip)
            query = request.rel_url.raw_query_string
            target = f"{path}?{query}" if query else path
            exchange = Exchange(trip, self._upstream, self._health, self._budget, self._limits, target, headers_to)
            return await exchange.run(request, lambda: explained(trip, exchange.endpoint) if EXPLAIN in headers else {})
        finally:
            self.in_progress -= 1

    async def _body(self, request: web.BaseRequest, headers: Mapping[str, str]) -> bytes:
        """Read a request's body. Raises ProxyError for one that is no JSON by its headers, too long or too slow."""
        _check_kind(headers)
        limit = self._settings.body_bytes_max
        too_large = ProxyError(
            413,
            f"the body is larger than proxy.bodyBytesMax ({limit} bytes)",
            "send less in one request",
            param="body",
            close=True,
        )
        if int(headers.get("content-length", "0")) > limit:
            raise too_large
        if headers.get("expect", "").lower() == "100-continue":
            assert request.transport is not None
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.content.is_eof() and request.content.exception() is None:  # all of it is here
            body = request.content.read_nowait()
            if len(body) > limit:
                raise too_large
            return body
        pieces: list[bytes] = []
        received = 0
        try:
            async with asyncio.timeout(self._settings.client_timeout):
                while piece := await request.content.readany():
                    received += len(piece)
                    if received > limit:
                        raise too_large
                    pieces.append(piece)
        except TimeoutError:
            limit_s = f"within proxy.clientTimeout ({self._settings.client_timeout:g} s)"
            raise ProxyError(408, f"the body did not arrive {limit_s}", "send it faster", param="body", close=True) from None
        except web.RequestPayloadError:
            raise ProxyError(
                400, "the body is framed wrongly", "send it as its headers say", param="body", close=True
            ) from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _engine_headers(self, request: web.BaseRequest, trip: Trip, endpoint: Endpoint) -> list[Pair]:
        routing = trip.request_headers()
        del routing[DESTINATION]  # it is for gateways, which choose the endpoint by it
        routing.pop(DP_RANK, None)
        if endpoint.names_rank:
            routing[DP_RANK] = str(endpoint.dp_rank)
        return to_engine(
            request.raw_headers,
            host=endpoint.authority,
            body_bytes=len(trip.asked.body),
            client=Client(request.remote or "unknown", request.scheme),
            routing=routing,
            authorization=self._engine_authorization,
            keep_authorization=not self._token.needed,
        )

    async def _model_list(self, path: str, headers: Mapping[str, str]) -> web.Response:
        authorization = self._engine_authorization
        if authorization is None and not self._token.needed:
            authorization = headers.get("authorization")
        own = authorization == self._engine_authorization
        sent: list[Pair] = [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]
        models = await self._models.get(sent, keep=own)
        if path == "/v1/models":
            return web.Response(body=msgspec.json.encode(models), content_type=JSON, headers={REQUEST_ID: headers[REQUEST_ID]})
        name = path.removeprefix("/v1/models/")
        for model in models.data:
            if model.get("id") == name:
                return web.Response(body=msgspec.json.encode(model), content_type=JSON)
        raise ProxyError(404, f"no engine serves the model {name[:200]}", "see GET /v1/models", param="model")

    def _health_answer(self, path: str) -> web.Response:
        """/healthz: whether the process serves. /readyz and /health: whether requests can go anywhere."""
        if path == "/healthz":
            return web.Response(body=b'{"status":"ok"}', content_type=JSON)
        if self.draining:
            raise StoppingError()
        if not any(self._health.healthy(endpoint.name) for endpoint in self._dispatcher.router.endpoints):
            raise ProxyError(503, "no engine is in rotation", "see GET /v1/endpoints", reason="rejected-no-endpoints")
        return web.Response(body=b'{"status":"ready"}', content_type=JSON)


def explained(trip: Trip, endpoint: Endpoint) -> dict[str, str]:
    """Return headers that say where a request went, and what was held there of its prompt."""
    told: dict[str, str] = {"x-kvatlas-endpoint": endpoint.name}
    found = first_matches(trip.decision)
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


def _refused(error: Exception, headers: Mapping[str, str]) -> web.Response:
    refusal = as_refusal(error)
    response = web.Response(status=refusal.status, body=refusal.body, headers=refusal.headers)
    response.headers[REQUEST_ID] = headers[REQUEST_ID]
    if getattr(error, "close", False):
        response.force_close()  # what is left of its body is not read
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="kvatlas"'
    return response


def _visible(text: str) -> str:
    """Return an id with what is no visible ASCII replaced."""
    return text if text.isascii() and text.isprintable() else "".join(one if "!" <= one <= "~" else "?" for one in text)
