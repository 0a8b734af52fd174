"""Every failure as an HTTP answer: status, and {"error": {"field", "problem", "remedy"}}."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from kvatlas.errors import KvatlasError, RequestError, RouteError, TokenizationError, TokenizationReason, TokensError
from kvatlas.serve.gate import OverloadedError
from kvatlas.serve.schema import ErrorAnswer, ErrorDetail, MalformedError

JSON = "application/json"


class TooLargeError(RequestError):
    """The body is longer than api.bodyBytesMax."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__("body", f"is larger than api.bodyBytesMax ({limit_bytes} bytes)", "send less in one request")


_STATUS_BY_ERROR: tuple[tuple[type[RequestError], int], ...] = (
    (MalformedError, 400),
    (TooLargeError, 413),
)

_NOT_HERE = frozenset(
    {
        TokenizationReason.NO_BACKEND,
        TokenizationReason.NOT_INSTALLED,
        TokenizationReason.UNSUPPORTED,
        TokenizationReason.BROKEN_TOKENIZER,
    }
)
"""Reasons that lie in how the service is set up: 501."""


def error_response(status: int, field: str, problem: str, remedy: str, headers: dict[str, str] | None = None) -> Response:
    """Return a failure as an answer."""
    return _response(status, ErrorDetail(field, problem, remedy), headers)


def _response(status: int, detail: ErrorDetail, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(ErrorAnswer(detail)), status, headers, JSON)


def _untokenized(error: TokenizationError) -> Response:
    detail = ErrorDetail(error.field, error.problem, error.remedy, error.reason.value)
    if error.reason.transient:
        return _response(503, detail, {"Retry-After": "1"})
    return _response(501 if error.reason in _NOT_HERE else 422, detail)


def fault_response(error: KvatlasError) -> Response:
    """Return one of our errors as an answer."""
    if isinstance(error, OverloadedError):
        remedy = f"retry after {error.retry_after_s} s"
        return error_response(503, "service", error.problem, remedy, {"Retry-After": str(error.retry_after_s)})
    if isinstance(error, TokensError):
        field = "token_ids" if error.position is None else f"token_ids[{error.position}]"
        return error_response(422, field, error.problem, "send integers from 0 to 4294967295")
    if isinstance(error, TokenizationError):
        return _untokenized(error)
    if isinstance(error, RequestError):
        status = next((status for kind, status in _STATUS_BY_ERROR if isinstance(error, kind)), 422)
        # Where the rest of a body is not read, its connection cannot be used again.
        headers = {"Connection": "close"} if status == 413 else None
        return error_response(status, error.field, error.problem, error.remedy, headers)
    if isinstance(error, RouteError):  # of a request that was only asked about
        return error_response(error.status, "request", error.problem, error.remedy)
    return error_response(500, "service", "failed inside", "see the service's log")


def add_fault_handlers(app: FastAPI) -> None:
    """Let an app answer all errors in one form."""

    async def ours(_request: Request, error: Exception) -> Response:
        if not isinstance(error, KvatlasError):
            raise TypeError(f"handler of KvatlasError was given {type(error)}")
        return fault_response(error)

    async def routing(_request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise TypeError(f"handler of HTTPException was given {type(error)}")
        remedies = {404: "see /docs for what is here", 405: "see /docs for the methods of this path"}
        phrase = HTTPStatus(error.status_code).phrase.lower()
        headers = dict(error.headers) if error.headers else None
        return error_response(error.status_code, "request", phrase, remedies.get(error.status_code, "see /docs"), headers)

    async def unforeseen(_request: Request, _error: Exception) -> Response:
        return error_response(500, "service", "failed inside", "see the service's log")

    app.add_exception_handler(KvatlasError, ours)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(Exception, unforeseen)
