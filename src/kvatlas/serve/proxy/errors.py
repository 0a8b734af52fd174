"""What can go wrong between a client and an engine, and as what answer it is told."""

from __future__ import annotations

import enum

from kvatlas.errors import KvatlasError
from kvatlas.serve.routing.refusals import Refusal, refusal, refused


class ProxyError(KvatlasError):
    """A request that the proxy answers itself. ``close``: its connection cannot be used again."""

    def __init__(
        self,
        status: int,
        problem: str,
        remedy: str,
        *,
        param: str | None = None,
        reason: str | None = None,
        close: bool = False,
    ) -> None:
        self.status = status
        self.param = param
        self.reason = reason
        self.close = close
        super().__init__(f"{problem}; {remedy}")


class BodyFault(enum.Enum):
    """Why a client's body was not taken."""

    TOO_LARGE = "too_large"
    TOO_SLOW = "too_slow"
    FRAMING = "framing"

    def error(self, bytes_max: int) -> ProxyError:
        """Return what its client is told. Nothing more is read from the connection."""
        status, problem, remedy = {
            self.TOO_LARGE: (413, f"is larger than proxy.bodyBytesMax ({bytes_max} bytes)", "send less in one request"),
            self.TOO_SLOW: (408, "did not arrive within proxy.clientTimeout", "send it faster"),
            self.FRAMING: (400, "is framed wrongly", "send it as its headers say"),
        }[self]
        return ProxyError(status, f"the body {problem}", remedy, param="body", close=True)


class Break(enum.Enum):
    """How a call to an engine failed."""

    NO_CONNECTION = "no_connection"
    """None was to be had; nothing was sent."""
    ALL_IN_USE = "all_in_use"
    """As many as there may be; nothing was sent."""
    RESET = "reset"
    """It closed the connection before its answer was whole."""
    GARBAGE = "garbage"
    """What it sent is no HTTP."""
    SILENT = "silent"
    """It said nothing for too long."""


class UpstreamError(KvatlasError):
    """A call to an engine that failed."""

    def __init__(self, how: Break, problem: str) -> None:
        self.how = how
        self.problem = problem
        super().__init__(problem)


def unanswered(error: UpstreamError, endpoint: str) -> ProxyError:
    """Return what a client is told where no engine answered."""
    problem = f"the engine {endpoint} did not answer: {error.problem}"
    if error.how is Break.ALL_IN_USE:
        return ProxyError(503, problem, "send it again later")
    if error.how is Break.SILENT:
        return ProxyError(504, problem, "ask for less, or let it wait longer (proxy.firstByteTimeout)")
    return ProxyError(502, problem, "send it again; see GET /v1/endpoints for who is there")


def as_refusal(error: Exception) -> Refusal:
    """Return an error as an answer."""
    if isinstance(error, ProxyError):
        return refused(error.status, str(error), param=error.param, reason=error.reason)
    return refusal(error)
