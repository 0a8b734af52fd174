"""Calls to engines: connections are kept and bounded for each engine; failures by what they mean for a retry."""

from __future__ import annotations

import asyncio
import io
import ssl
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
from aiohttp.http_exceptions import BadHttpMessage
from multidict import CIMultiDict
from yarl import URL

from kvatlas.route.endpoint import Endpoint
from kvatlas.serve.proxy.errors import Break, UpstreamError
from kvatlas.serve.proxy.headers import Pair

BUFFER_BYTES_MAX = 64 << 10
"""Of an answer that its client does not take: beyond twice this the engine is read no further."""
HEADER_BYTES_MAX = 16 << 10
"""Of one header of an answer, or its status line."""

PIECE_BYTES = 256 << 10

_NOTHING_OF_ITS_OWN = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


class UpstreamLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a call may cost. Times in seconds."""

    connections_max: int
    connect_s: float
    first_byte_s: float
    idle_s: float
    keep_alive_s: float


class EngineAnswer:
    """An answer whose head is here. Has to be given back (:meth:`Upstream.release`)."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Sequence[Pair] = response.raw_headers

    @property
    def complete(self) -> bool:
        """Whether all of it is here; a part of it may not be read yet."""
        return self._response.content.is_eof() and self._response.content.exception() is None

    async def read(self, idle_s: float) -> bytes:
        """Return what came of the body since the last call, as soon as anything did; b"" at its end. Raises UpstreamError."""
        content = self._response.content
        if content.is_eof() and content.exception() is None:
            return content.read_nowait()
        with _failures(idle_s, "its answer stopped midway"):
            async with asyncio.timeout(idle_s):
                return await content.readany()

    def close(self) -> None:
        """Let go of the connection: kept where the answer was read to the end, else closed, so that the engine stops."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class Upstream:
    """Sends requests to engines. Runs in one event loop."""

    def __init__(self, limits: UpstreamLimits, tls: ssl.SSLContext | None = None) -> None:
        """``tls``: for endpoints that want it."""
        self.limits = limits
        self._tls = tls
        self._open: Counter[str] = Counter()
        self._session: aiohttp.ClientSession | None = None

    async def send(
        self, endpoint: Endpoint, method: str, target: str, headers: Sequence[Pair], body: bytes | None = None
    ) -> EngineAnswer:
        """Send a request, and return its answer when that begins; :meth:`release` it in the end. Raises UpstreamError.

        A connection that was kept may have been closed by the engine just now: then another one is used.
        """
        if self._open[endpoint.url] >= self.limits.connections_max:
            raise UpstreamError(Break.ALL_IN_USE, f"all {self.limits.connections_max} connections to it are in use")
        self._open[endpoint.url] += 1
        try:
            return await self._send(endpoint, method, target, _decoded(headers), body)
        except BaseException:
            self._less(endpoint)
            raise

    def release(self, endpoint: Endpoint, answer: EngineAnswer) -> None:
        """Let go of an answer."""
        answer.close()
        self._less(endpoint)

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    async def _send(
        self, endpoint: Endpoint, method: str, target: str, headers: CIMultiDict[str], body: bytes | None
    ) -> EngineAnswer:
        url = URL(endpoint.url + target, encoded=True)
        while True:
            call = SimpleNamespace(kept=False)
            try:
                with _failures(self.limits.first_byte_s, "no answer began"):
                    async with asyncio.timeout(self.limits.first_byte_s):
                        response = await self._client().request(
                            method,
                            url,
                            headers=headers,
                            data=_payload(body),
                            allow_redirects=False,
                            ssl=self._tls if self._tls is not None and endpoint.tls else True,
                            trace_request_ctx=call,
                        )
            except UpstreamError as error:
                if error.how is not Break.RESET or not call.kept:
                    raise
            else:
                return EngineAnswer(response)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_connection_reuseconn.append(_note_kept)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=self.limits.keep_alive_s),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=_NOTHING_OF_ITS_OWN,
                auto_decompress=False,
                read_bufsize=BUFFER_BYTES_MAX,
                max_line_size=HEADER_BYTES_MAX,
                max_field_size=HEADER_BYTES_MAX,
                trace_configs=[trace],
            )
        return self._session

    def _less(self, endpoint: Endpoint) -> None:
        self._open[endpoint.url] -= 1
        if not self._open[endpoint.url]:
            del self._open[endpoint.url]


async def _note_kept(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: Any) -> None:
    context.trace_request_ctx.kept = True


@contextmanager
def _failures(limit_s: float, silence: str) -> Iterator[None]:
    """Raise what goes wrong as UpstreamError."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError:
        raise UpstreamError(Break.NO_CONNECTION, "no connection in time (proxy.connectTimeout)") from None
    except TimeoutError:
        raise UpstreamError(Break.SILENT, f"{silence} for {limit_s:g} s") from None
    except aiohttp.ClientConnectorCertificateError as error:
        raise UpstreamError(Break.NO_CONNECTION, f"no connection: {error.certificate_error}") from None
    except aiohttp.ClientConnectorError as error:
        raise UpstreamError(Break.NO_CONNECTION, f"no connection: {error.os_error.strerror or error.os_error}") from None
    except (aiohttp.ClientResponseError, aiohttp.InvalidURL) as error:
        raise UpstreamError(Break.GARBAGE, f"its answer is no HTTP: {str(error)[:200]}") from None
    except aiohttp.ClientPayloadError as error:
        how, problem = Break.RESET, "it closed the connection before its answer was whole"
        if isinstance(error.__cause__, BadHttpMessage):
            how, problem = Break.GARBAGE, f"its answer is no HTTP: {error.__cause__.message[:200]}"
        raise UpstreamError(how, problem) from None
    except (aiohttp.ClientError, OSError):
        raise UpstreamError(Break.RESET, "it closed the connection before its answer was whole") from None


def _payload(body: bytes | None) -> bytes | io.BytesIO | None:
    """Return a body as aiohttp likes it: a large one as a file, which is written piece by piece."""
    return body if body is None or len(body) <= PIECE_BYTES else io.BytesIO(body)


def _decoded(headers: Sequence[Pair]) -> CIMultiDict[str]:
    return CIMultiDict((name.decode("latin-1"), value.decode("utf-8", "replace")) for name, value in headers)
