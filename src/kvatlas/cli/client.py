"""HTTP requests to a running service; its failures told as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import urlencode

import httpx
import msgspec

from kvatlas.errors import RequestError
from kvatlas.results import PodStatus, ScoreResult
from kvatlas.serve.routing.explain import DecisionsAnswer, DecisionShown
from kvatlas.serve.schema import ErrorAnswer, HealthAnswer, LocalityAnswer, PodsAnswer

TIMEOUT_S = 30.0
WORKER_TIMEOUT_S = 5.0
"""For another worker of a service that answered."""
WORKERS_MAX = 64

A = TypeVar("A", bound=msgspec.Struct)


class ServiceClient:
    """Asks one service. Every method raises RequestError that says what to do."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._transport = transport
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise RequestError(url, f"is no URL: {error}", 'name the service with --url, as "http://127.0.0.1:8080"') from None

    def score(self, body: Mapping[str, Any]) -> tuple[ScoreResult, bytes]:
        """Return the answer to a score request, read and as it came."""
        content = self._ask("POST", "/v1/score", body).content
        return self._read(content, ScoreResult), content

    def pods(self) -> tuple[tuple[PodStatus, ...], bytes]:
        """Return every stream's status, read and as it came."""
        content = self._ask("GET", "/v1/pods").content
        return self._read(content, PodsAnswer).pods, content

    def decisions(self, request_id: str | None, endpoint: str | None, limit: int) -> tuple[tuple[DecisionShown, ...], bytes]:
        """Return the router's last decisions, or the one for a request; read and as they came."""
        given = {"id": request_id, "endpoint": endpoint, "limit": str(limit)}
        query = urlencode({name: value for name, value in given.items() if value is not None})
        content = self._ask("GET", f"/v1/decisions?{query}").content
        return self._read(content, DecisionsAnswer).decisions, content

    def workers(self) -> tuple[str, tuple[ServiceClient, ...]]:
        """Return which of several workers is asked ("0 of 4"), and a client for each of them, itself one; empty: it is alone.

        Only itself where it does not know where the others are.
        """
        headers = self._ask("GET", "/v1/decisions?limit=1").headers
        name = headers.get("x-kvatlas-worker", "")
        ports = [int(port) for port in headers.get("x-kvatlas-api-ports", "").split() if port.isdecimal()]
        own = name.partition(" ")[0]
        if not ports or not own.isdecimal():
            return name, (self,)
        return name, tuple(self if place == int(own) else self._at(port) for place, port in enumerate(ports[:WORKERS_MAX]))

    def metrics(self) -> str:
        """Return the metrics' text."""
        return self._ask("GET", "/metrics").text

    def block_size_tokens(self) -> int:
        """Return the index's block size."""
        return self._read(self._ask("POST", "/v1/locality", {"keys": []}).content, LocalityAnswer).block_size_tokens

    def ready(self) -> tuple[bool, str | None]:
        """Return whether answers can be relied on, and why not."""
        response = self._send("GET", "/readyz")
        health = self._read(response.content, HealthAnswer)
        return response.status_code == httpx.codes.OK, health.reason

    def _at(self, port: int) -> ServiceClient:
        """Return a client of the same host's other port, with a shorter wait."""
        return ServiceClient(
            str(httpx.URL(self.url).copy_with(port=port)), self._token, transport=self._transport, timeout_s=WORKER_TIMEOUT_S
        )

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        response = self._send(method, path, body)
        if response.status_code == httpx.codes.OK:
            return response
        if response.status_code == httpx.codes.NOT_FOUND:
            raise RequestError(self.url, f"has no {path.partition('?')[0]}", "is it a `kvatlas route`, and of this version?")
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise RequestError(self.url, "wants a bearer token, or another one", "give --token or set KVATLAS_API_TOKEN")
        try:
            told = msgspec.json.decode(response.content, type=ErrorAnswer).error
        except msgspec.DecodeError:
            problem = f"answered {method} {path} with status {response.status_code}"
            raise RequestError(self.url, problem, "is it a kvatlas service? see its log") from None
        raise RequestError(told.field, told.problem, told.remedy)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        content = None if body is None else msgspec.json.encode(body)
        try:
            return self._http.request(method, path, content=content, headers={"Content-Type": "application/json"})
        except httpx.UnsupportedProtocol:
            raise RequestError(self.url, "is no http:// or https:// URL", "name the service with --url") from None
        except httpx.ConnectError as error:
            raise RequestError(
                self.url, f"cannot be reached: {error}", "start `kvatlas serve` or `kvatlas route`, or name it with --url"
            ) from None
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {error}".rstrip(": ")
            raise RequestError(self.url, f"did not answer {path}: {problem}", "see its log") from None

    def _read(self, content: bytes, kind: type[A]) -> A:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError as error:
            remedy = "is it a kvatlas service of this version?"
            raise RequestError(self.url, f"gave an answer that is none of kvatlas: {error}", remedy) from None
