"""The proxy's HTTP in Python: aiohttp's server and client. Speaks TLS on both sides, and needs no native core."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from multidict import CIMultiDict

from kvatlas.config.proxy import ProxySettings
from kvatlas.errors import ConfigError
from kvatlas.netloc import netloc
from kvatlas.route.endpoint import Endpoint
from kvatlas.serve.listening import bind
from kvatlas.serve.proxy.call import Handle, Passed, PassEnd, Reply, Sent, Watcher
from kvatlas.serve.proxy.errors import BodyFault, Break, ProxyError, UpstreamError, as_refusal
from kvatlas.serve.proxy.headers import Client, by_name, framing_problem, to_client, to_engine
from kvatlas.serve.proxy.upstream import EngineAnswer, Upstream, UpstreamLimits
from kvatlas.serve.routing.answers import AnswerReader

BACKLOG = 1024
LINGER_S = 2.0
"""How long what is left of a refused body is read, so that its client reads the answer."""
CUT_S = 2.0
"""For requests that are cut to end."""
UNTIMED_BYTES_MAX = 32 << 10
"""A piece up to this length goes into an empty buffer without waiting, and so needs no time limit."""

BROKEN_OFF = b'data: {"error":{"message":"the engine broke off","type":"server_error","param":null,"code":502}}\n\n'
"""The last event of a stream that its engine broke off. No [DONE] follows, and the connection is closed."""


class PythonStack:
    """A Stack. Several processes may share its port (``reusePort``)."""

    def __init__(self, settings: ProxySettings) -> None:
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
        self._tls = _listener_tls(settings)
        self._connections: _Connections | None = None
        self._listener: asyncio.Server | None = None
        self.url = ""

    async def start(self, handle: Handle) -> None:
        bound = bind("proxy", self._settings.host, self._settings.port, reuse_port=self._settings.reuse_port)
        self._connections = _Connections(handle, self._upstream, self._settings)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._connections, sock=bound, backlog=BACKLOG, ssl=self._tls)
        scheme = "http" if self._tls is None else "https"
        self.url = f"{scheme}://{netloc(*bound.getsockname()[:2])}"

    async def stop(self, grace_s: float) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._connections is not None:
            self._connections.close_idle()
            await self._connections.idle(grace_s)
            await self._connections.shutdown(0.05)
            await self._connections.idle(CUT_S)
        await self._upstream.close()

    async def fetch(self, endpoint: Endpoint, target: str, headers: Mapping[str, str], bytes_max: int) -> tuple[int, bytes]:
        sent = [(b"host", endpoint.authority.encode("latin-1"))]
        sent += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        answer = await self._upstream.send(endpoint, "GET", target, sent)
        try:
            body = bytearray()
            while piece := await answer.read(self._upstream.limits.idle_s):
                body += piece
                if len(body) > bytes_max:
                    raise UpstreamError(Break.GARBAGE, f"its answer has more than {bytes_max} bytes")
            return answer.status, bytes(body)
        finally:
            self._upstream.release(endpoint, answer)


class AiohttpCall:
    """A ClientCall."""

    def __init__(self, request: web.BaseRequest, upstream: Upstream, client_s: float, *, keep_authorization: bool) -> None:
        """``client_s``: for the client to send its body, or to take a piece of the answer."""
        self.method = request.method
        self.path = request.rel_url.raw_path
        self.query = request.rel_url.raw_query_string
        self.headers = by_name(request.raw_headers)
        self.problem = framing_problem(request.raw_headers)
        self.response: web.StreamResponse | None = None
        """What its client has begun to get of an engine's answer."""
        self._request = request
        self._upstream = upstream
        self._client_s = client_s
        self._keep_authorization = keep_authorization
        self._sent_s = 0.0
        self._held: tuple[Sent, EngineAnswer, Watcher] | None = None

    async def body(self, bytes_max: int) -> bytes:
        request = self._request
        too_large = BodyFault.TOO_LARGE.error(bytes_max)
        if int(self.headers.get("content-length", "0")) > bytes_max:
            raise too_large
        if self.headers.get("expect", "").lower() == "100-continue":
            assert request.transport is not None
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.content.is_eof() and request.content.exception() is None:  # all of it is here
            body = request.content.read_nowait()
            if len(body) > bytes_max:
                raise too_large
            return body
        pieces: list[bytes] = []
        received = 0
        try:
            async with asyncio.timeout(self._client_s):
                while piece := await request.content.readany():
                    received += len(piece)
                    if received > bytes_max:
                        raise too_large
                    pieces.append(piece)
        except TimeoutError:
            raise BodyFault.TOO_SLOW.error(bytes_max) from None
        except web.RequestPayloadError:
            raise BodyFault.FRAMING.error(bytes_max) from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def forward(self, sent: Sent, watcher: Watcher) -> Passed | None:
        self.release()
        headers = to_engine(
            self._request.raw_headers,
            host=sent.endpoint.authority,
            body_bytes=len(sent.body),
            client=Client(self._request.remote or "unknown", self._request.scheme),
            routing=sent.routing,
            keep_authorization=self._keep_authorization,
        )
        self._sent_s = time.perf_counter()
        answer = await self._upstream.send(sent.endpoint, "POST", sent.target, headers, sent.body)
        self._held = sent, answer, watcher
        watcher.answered(answer.status, CIMultiDict(to_client(answer.headers)))
        return None if answer.status == 503 else await self.pass_held()

    async def pass_held(self) -> Passed:
        assert self._held is not None
        sent, answer, watcher = self._held
        try:
            return await self._pass_on(answer, _passed_headers(sent, answer), watcher)
        finally:
            self.release()

    def cut(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()

    def release(self) -> None:
        """Let go of an answer that nobody gets, or that has passed."""
        if self._held is not None:
            sent, answer, _ = self._held
            self._held = None
            self._upstream.release(sent.endpoint, answer)

    async def _pass_on(self, answer: EngineAnswer, headers: CIMultiDict[str], watcher: Watcher) -> Passed:
        """Pass an answer on, each piece as it comes."""
        events = headers.get("Content-Type", "").startswith("text/event-stream")
        reader = AnswerReader(stream=events)

        def passed(end: PassEnd) -> Passed:
            return Passed(end, reader.usage(), reader.said_done, time.perf_counter() - self._sent_s)

        def feed(piece: bytes) -> None:
            if reader.feed(piece):
                watcher.first_token(time.perf_counter() - self._sent_s)

        if answer.complete:  # all of it is here: it goes out at once
            body = await answer.read(0.0)
            feed(body)
            self.response = web.Response(body=body, status=answer.status, headers=headers)
            return passed(PassEnd.WHOLE)
        self.response = response = web.StreamResponse(status=answer.status, headers=headers)
        piece = b"\n\n"
        try:
            await response.prepare(self._request)
            while following := await answer.read(self._upstream.limits.idle_s):
                piece = following
                feed(piece)
                await self._write(response, piece)
        except UpstreamError:
            if events and piece.endswith(b"\n\n"):
                with contextlib.suppress(ConnectionError):
                    await self._write(response, BROKEN_OFF)
            self._request.protocol.force_close()  # once what was written is sent
            return passed(PassEnd.BROKEN)
        except ConnectionError:
            self.cut()
            return passed(PassEnd.CLIENT_GONE)
        except asyncio.CancelledError:
            watcher.left(passed(PassEnd.CLIENT_GONE))
            raise
        return passed(PassEnd.WHOLE)

    async def _write(self, response: web.StreamResponse, piece: bytes) -> None:
        """Hand a piece to the client's answer. Raises ConnectionError where that is gone, or takes nothing for too long."""
        transport = self._request.transport
        if transport is not None and len(piece) <= UNTIMED_BYTES_MAX and not transport.get_write_buffer_size():
            await response.write(piece)
            return
        try:
            async with asyncio.timeout(self._client_s):
                await response.write(piece)
        except TimeoutError:
            raise ConnectionResetError("the client takes nothing") from None


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

    def __init__(self, handle: Handle, upstream: Upstream, settings: ProxySettings) -> None:
        options: dict[str, Any] = {
            "access_log": None,
            "keepalive_timeout": settings.keep_alive,
            "auto_decompress": False,
            "lingering_time": LINGER_S,
            "tcp_keepalive": True,
        }
        super().__init__(self._handle, handler_cancellation=True, **options)
        self._handle_call = handle
        self._upstream = upstream
        self._client_s = settings.client_timeout
        self._keep_authorization = settings.token is None
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
        call = AiohttpCall(request, self._upstream, self._client_s, keep_authorization=self._keep_authorization)
        try:
            reply = await self._handle_call(call)
            if reply is None:
                assert call.response is not None
                return call.response
            return _response(reply)
        finally:
            call.release()
            self._busy.discard(request.protocol)
            if not self._busy:
                self._all_idle.set()


def _response(reply: Reply) -> web.Response:
    response = web.Response(status=reply.status, body=reply.body, headers=reply.headers)
    if reply.close:
        response.force_close()  # what is left of its body is not read
    return response


def _passed_headers(sent: Sent, answer: EngineAnswer) -> CIMultiDict[str]:
    headers = CIMultiDict(to_client(answer.headers))
    for name in sent.hidden:
        headers.popall(name, None)
    headers.update(sent.reply)
    return headers


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
