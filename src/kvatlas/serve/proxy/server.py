"""The proxy as a server: a listener, clients' connections, and a graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from prometheus_client import CollectorRegistry

from kvatlas.config.proxy import ProxySettings
from kvatlas.discovery.health import Health
from kvatlas.errors import ConfigError
from kvatlas.serve.proxy.errors import ProxyError, as_refusal
from kvatlas.serve.proxy.handler import ProxyHandler
from kvatlas.serve.proxy.metrics import ProxyMetrics
from kvatlas.serve.proxy.upstream import Upstream, UpstreamLimits
from kvatlas.serve.routing.dispatch import Dispatcher

BACKLOG = 1024
LINGER_S = 2.0
"""How long what is left of a refused body is read, so that its client reads the answer."""
CUT_S = 2.0
"""For requests that are cut to end."""


class ProxyServer:
    """Serves between :meth:`start` and :meth:`stop`, in one event loop. Several processes may share a port (``reusePort``)."""

    def __init__(self, dispatcher: Dispatcher, health: Health, settings: ProxySettings, registry: CollectorRegistry) -> None:
        """Raises ConfigError where a file of settings can't be used."""
        self._settings = settings
        self._upstream = Upstream(
            UpstreamLimits(
                connections_max=settings.engine_connections_max,
                connect_s=settings.connect_timeout,
                first_byte_s=settings.first_byte_timeout,
                idle_s=settings.idle_timeout,
                keep_alive_s=settings.engine_keep_alive,
            ),
            _engine_tls(settings),
        )
        metrics = ProxyMetrics(registry)
        self._handler = ProxyHandler(dispatcher, health, self._upstream, settings, metrics)
        metrics.observe(lambda: self._handler.in_progress)
        self._tls = _listener_tls(settings)
        self._connections: _Connections | None = None
        self._listener: asyncio.Server | None = None
        self.url = ""
        """Where it listens, once started."""

    @property
    def in_progress(self) -> int:
        """Requests admitted and not answered to the end."""
        return self._handler.in_progress

    async def start(self) -> None:
        """Listen. Raises ConfigError where the address cannot be had."""
        bound = bind(self._settings)
        self._connections = _Connections(self._handler, self._settings)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._connections, sock=bound, backlog=BACKLOG, ssl=self._tls)
        host, port = bound.getsockname()[:2]
        netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.url = f"{'http' if self._tls is None else 'https'}://{netloc}"

    def drain(self) -> None:
        """Say in readiness that it stops, and refuse new requests; those in progress go on."""
        self._handler.draining = True

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no new connections, let requests in progress finish within the grace (proxy.shutdownGrace), then cut them."""
        self.drain()
        if self._listener is not None:
            self._listener.close()
        if self._connections is not None:
            self._connections.close_idle()
            await self._connections.idle(self._settings.shutdown_grace if grace_s is None else grace_s)
            await self._connections.shutdown(0.05)
            await self._connections.idle(CUT_S)
        await self._upstream.close()


class _ClientConnection(RequestHandler):
    """aiohttp's, with failures below HTTP told as all others."""

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        error = ProxyError(
            400, f"the request is no HTTP that is taken here: {message or exc}"[:400], "send HTTP/1.1 with one length"
        )
        refusal = as_refusal(error if status < 500 else RuntimeError())
        response = web.Response(status=refusal.status, body=refusal.body, headers=refusal.headers)
        response.force_close()
        return response


class _Connections(web.Server):
    """Clients' connections: as many as there may be."""

    def __init__(self, handler: ProxyHandler, settings: ProxySettings) -> None:
        options: dict[str, Any] = {
            "access_log": None,
            "keepalive_timeout": settings.keep_alive,
            "auto_decompress": False,
            "lingering_time": LINGER_S,
            "tcp_keepalive": True,
        }
        super().__init__(self._handle, handler_cancellation=True, **options)
        self._handler = handler
        self._options = options
        self._connections_max = settings.connections_max
        self._busy: set[object] = set()
        self._all_idle = asyncio.Event()

    def __call__(self) -> _ClientConnection:
        return _ClientConnection(self, loop=asyncio.get_running_loop(), **self._options)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._connections) > self._connections_max:
            transport.abort()

    def close_idle(self) -> None:
        """Close connections that carry no request."""
        for connection in self.connections:
            if connection not in self._busy:
                connection.force_close()

    async def idle(self, limit_s: float) -> bool:
        """Return when no request is in progress, or the time is over: False then."""
        if self._busy:
            self._all_idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_idle.wait(), limit_s)
        return not self._busy

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._busy.add(request.protocol)
        try:
            return await self._handler.handle(request)
        finally:
            self._busy.discard(request.protocol)
            if not self._busy:
                self._all_idle.set()


def bind(settings: ProxySettings) -> socket.socket:
    """Return a socket at the proxy's address, which takes no connections yet. ConfigError where that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError("proxy.host", f"{settings.host!r} is no address: {error}", "an address of this machine") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if settings.reuse_port:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        problem = f"cannot listen on {settings.host}:{settings.port}: {error.strerror}"
        raise ConfigError("proxy.port", problem, "a free port of this machine, or 0 for any") from None
    return bound


def _listener_tls(settings: ProxySettings) -> ssl.SSLContext | None:
    if settings.tls_cert_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError("proxy.tlsCertFile", f"no use with proxy.tlsKeyFile: {error}", "a PEM chain and its key") from None
    return context


def _engine_tls(settings: ProxySettings) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=settings.engine_ca_file)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError("proxy.engineCaFile", f"cannot be read: {error}", "a file of PEM certificates") from None
