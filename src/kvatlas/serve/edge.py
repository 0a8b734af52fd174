"""What happens to every HTTP request before and after its route: token, time limit, metrics, log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any

from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvatlas.config import ApiSettings
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.serve.faults import error_response
from kvatlas.serve.token import TokenCheck

CLIENT_GONE = 499
"""The status counted where the client went away before its answer; nobody receives it."""

_log = get_logger(__name__)


class Edge:
    """ASGI middleware around the whole app. ``routes``: paths that may be metric labels; all others are "unmatched"."""

    def __init__(
        self, app: ASGIApp, *, api: ApiSettings, metrics: Metrics, routes: Collection[str], open_paths: Collection[str]
    ) -> None:
        self._app = app
        self._token = TokenCheck(api.token)
        self._timeout_s = api.request_timeout
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        scope.setdefault("state", {})["authorized"] = self._authorized(scope)
        began = time.perf_counter()
        try:
            if scope["path"] not in self._open and not scope["state"]["authorized"]:
                await _unauthorized()(scope, exchange.receive, exchange.send)
            else:
                await self._answer(scope, exchange)
        finally:
            seconds = time.perf_counter() - began
            route = scope["path"] if scope["path"] in self._routes else "unmatched"
            status = exchange.status or (CLIENT_GONE if exchange.gone else 500)
            self._metrics.http(route, scope["method"], status, seconds)
            # The path only: a query string may carry token ids.
            _log.debug("request", method=scope["method"], route=route, status=status, seconds=round(seconds, 6))

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._app(scope, exchange.receive, exchange.send)
        except TimeoutError:
            if exchange.status is not None:
                raise  # the answer has begun: all that is left is to cut the connection
            await self._too_late(exchange.body_read)(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            # Only the server's stop cancels, when the grace is over. Say so, and let the connection end.
            _log.warning("request cut off: the service stops", method=scope["method"], began=exchange.status is not None)
            if exchange.status is None:
                headers = {"Retry-After": "5", "Connection": "close"}
                stopping = error_response(503, "service", "is stopping", "retry after 5 s", headers)
                await stopping(scope, exchange.receive, exchange.send)

    def _too_late(self, body_read: bool) -> Response:
        limit = f"within api.requestTimeout ({self._timeout_s:g} s)"
        if body_read:
            return error_response(504, "service", f"no answer {limit}", "ask for less, or again later")
        close = {"Connection": "close"}
        return error_response(408, "body", f"was not received {limit}", "send it faster", close)

    def _authorized(self, scope: Scope) -> bool:
        return self._token.allows(Headers(scope=scope).get("authorization"))


class _Exchange:
    """One request's messages, watched."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.status: int | None = None
        self.body_read = False
        self.gone = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
        elif not message.get("more_body", False):
            self.body_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _unauthorized() -> Response:
    headers: dict[str, Any] = {"WWW-Authenticate": 'Bearer realm="kvatlas"', "Connection": "close"}
    return error_response(
        401, "authorization", "the bearer token is missing or wrong", "send the header Authorization: Bearer TOKEN", headers
    )
