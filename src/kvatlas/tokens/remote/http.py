"""HTTP calls that end when they should: a renderer that sends its answer byte by byte, or without end, cannot hold a thread."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import httpcore
import msgspec

from kvatlas.tokens.remote.calls import Deadline

REFUSAL_BYTES_MAX = 64 << 10
"""Of an answer that is no success only a message is wanted."""

KEPT_S = 3.0
"""How long an idle connection is kept: less than the 5 s of vLLM's server, which would close it under a request."""


class NoAnswerError(Exception):
    """A call had no usable answer: it could not be made, broke off, or brought too much."""


class LateAnswerError(Exception):
    """A call did not end in time."""


class Answer(msgspec.Struct, frozen=True):
    """What a server answered: the whole body of a success, the beginning of any other."""

    status: int
    body: bytes


class HttpCalls:
    """Posts JSON over kept connections, from several threads. No redirects are followed, no proxies used."""

    def __init__(self, token: str | None, connections_max: int, answer_bytes_max: int) -> None:
        self._answer_bytes_max = answer_bytes_max
        self._deadline = _ThreadDeadline()
        self._pool = httpcore.ConnectionPool(
            max_connections=connections_max,
            max_keepalive_connections=connections_max,
            keepalive_expiry=KEPT_S,
            network_backend=_TimedBackend(self._deadline),
        )
        self._headers = [("Content-Type", "application/json"), ("Accept", "application/json"), ("Accept-Encoding", "identity")]
        if token is not None:
            self._headers.append(("Authorization", f"Bearer {token}"))

    def post(self, url: str, body: bytes, deadline: Deadline) -> Answer:
        """Return the answer. Raises LateAnswerError or NoAnswerError.

        A server may close a kept connection just when it is used again: the call is then made on another one.
        """
        self._deadline.value = deadline
        try:
            while True:
                progress = _Progress()
                try:
                    return self._post(url, body, progress)
                except (httpcore.NetworkError, httpcore.RemoteProtocolError):
                    if progress.connected or progress.answered:
                        raise
        except httpcore.TimeoutException:
            raise LateAnswerError from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, ssl.SSLError, OSError) as error:
            raise NoAnswerError(str(error) or type(error).__name__) from None
        finally:
            self._deadline.value = None

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()

    def _post(self, url: str, body: bytes, progress: _Progress) -> Answer:
        headers = [*self._headers, ("Content-Length", str(len(body)))]
        with self._pool.stream("POST", url, headers=headers, content=body, extensions={"trace": progress.saw}) as got:
            progress.answered = True
            return Answer(got.status, self._read(got))

    def _read(self, got: httpcore.Response) -> bytes:
        success = 200 <= got.status < 300
        limit = self._answer_bytes_max if success else REFUSAL_BYTES_MAX
        encoding = next((value for name, value in got.headers if name.lower() == b"content-encoding"), b"identity")
        if encoding != b"identity":
            raise NoAnswerError(f"answers in the encoding {encoding!r:.40}, which was not asked for")
        body = bytearray()
        assert isinstance(got.stream, Iterable)
        for chunk in got.stream:
            body += chunk
            if len(body) > limit:
                if success:
                    raise NoAnswerError(f"answers with more than {limit} bytes (answerBytesMax)")
                return bytes(body[:limit])
        return bytes(body)


class _Progress:
    """How far a call has come: whether it opened a connection, and whether an answer began."""

    connected = False
    answered = False

    def saw(self, event: str, _info: Mapping[str, Any]) -> None:
        """Take note of what httpcore does."""
        if event == "connection.connect_tcp.started":
            self.connected = True


class _ThreadDeadline(threading.local):
    """The deadline of the call that a thread makes; it makes one at a time."""

    value: Deadline | None = None

    def limited(self, timeout_s: float | None) -> float | None:
        """Return the longest that a step of the call may take."""
        if self.value is None:
            return timeout_s
        left_s = self.value.left_s
        if left_s <= 0:
            raise httpcore.ReadTimeout("the call's time is over")
        return left_s if timeout_s is None else min(left_s, timeout_s)


class _TimedBackend(httpcore.NetworkBackend):
    """httpcore bounds each read and write, but not all of them together; here every step ends with the call's deadline."""

    def __init__(self, deadline: _ThreadDeadline) -> None:
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        stream = self._backend.connect_tcp(host, port, self._deadline.limited(timeout), local_address, socket_options)
        return _TimedStream(stream, self._deadline)


class _TimedStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, deadline: _ThreadDeadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.limited(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.limited(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, self._deadline.limited(timeout))
        return _TimedStream(secured, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
