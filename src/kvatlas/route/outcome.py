"""How a request went, as far as its front door could see."""

from __future__ import annotations

import enum

import msgspec


class End(enum.Enum):
    """How a request ended."""

    DONE = "done"
    ENGINE_ERROR = "engine_error"
    """The engine answered with an error of its own (5xx), or broke off."""
    REFUSED = "refused"
    """The engine answered with 4xx: the request was at fault."""
    UNREACHABLE = "unreachable"
    """No answer began."""
    CLIENT_GONE = "client_gone"


class Outcome(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What was seen of a request's answer. None: not seen."""

    end: End
    ttft_s: float | None = None
    """From sending the request to the engine until its first body byte that carries a token."""
    duration_s: float | None = None
    """From sending it until the end of the answer."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """The engine's own figure (``usage.prompt_tokens_details.cached_tokens``)."""
    output_tokens: int | None = None
