"""A request that goes nowhere, as its client is told: status, headers, and a body as OpenAI's API has it."""

from __future__ import annotations

import msgspec

from kvatlas.errors import RequestError, RouteError

DROPPED_REASON = "x-llm-d-request-dropped-reason"
RETRY_AFTER_S = 1


class Refusal(msgspec.Struct, frozen=True):
    """An answer of the router's own."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def refusal(error: Exception) -> Refusal:
    """Return what a client is told of an error: a RequestError is 400, a RouteError says its status, anything else is 500."""
    if isinstance(error, RequestError):
        return refused(400, str(error), param=error.field)
    if isinstance(error, RouteError):
        return refused(error.status, str(error), reason=error.reason)
    return refused(500, "the router failed inside; see its log")


def refused(status: int, message: str, *, param: str | None = None, reason: str | None = None) -> Refusal:
    """Return an answer. ``reason``: for x-llm-d-request-dropped-reason. Source of the body: OpenAI's API reference, errors."""
    headers = [("content-type", "application/json")]
    if reason is not None:
        headers.append((DROPPED_REASON, reason))
    if status in (429, 503):
        headers.append(("retry-after", str(RETRY_AFTER_S)))
    error = {"message": message, "type": _kind(status), "param": param, "code": status}
    return Refusal(status, tuple(headers), msgspec.json.encode({"error": error}))


def _kind(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
