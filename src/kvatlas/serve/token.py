"""The bearer token of HTTP and gRPC."""

from __future__ import annotations

import hmac


class TokenCheck:
    """Compares ``Authorization: Bearer TOKEN`` in a time that does not depend on where it differs.

    ``token`` None: everybody may ask.
    """

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else token.encode()

    @property
    def needed(self) -> bool:
        return self._token is not None

    def allows(self, authorization: str | bytes | None) -> bool:
        """Whether a request with this header value may pass."""
        if self._token is None:
            return True
        if authorization is None:
            return False
        value = authorization.encode("utf-8", "surrogateescape") if isinstance(authorization, str) else authorization
        scheme, _, given = value.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token)
