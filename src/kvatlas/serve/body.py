"""A request's body, read within bounds."""

from __future__ import annotations

from fastapi import Request

from kvatlas.serve.faults import TooLargeError


async def read_bytes(request: Request, limit_bytes: int) -> bytes:
    """Return the body. Raises TooLargeError as soon as it is seen to be longer, before the rest is received."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise TooLargeError(limit_bytes)
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > limit_bytes:
            raise TooLargeError(limit_bytes)
        body += chunk
    return bytes(body)
