"""Which session is at which endpoint: bounded in number, in size and in time."""

from __future__ import annotations

import hashlib

from kvatlas.route.endpoint import EndpointName

SESSIONS_MAX = 100_000
"""About 20 MB. Of more, those that were used longest ago are forgotten, and go wherever the other plugins send them."""


class SessionStore:
    """Remembers where sessions are, until they were not used for ``ttl_s``. Of ids it keeps digests: long ones cost no more."""

    def __init__(self, ttl_s: float, sweep_s: float, sessions_max: int = SESSIONS_MAX) -> None:
        """``sweep_s``: how often what expired is removed, at most. It is not returned before that either."""
        self._ttl_s = ttl_s
        self._sweep_s = sweep_s
        self._sessions_max = sessions_max
        self._bound: dict[bytes, tuple[EndpointName, float]] = {}
        """Endpoint and last use, longest ago first."""
        self._swept_s = 0.0

    def __len__(self) -> int:
        return len(self._bound)

    def get(self, session: str, now_s: float) -> EndpointName | None:
        """Return where a session is; None where that is not known, or too long ago."""
        found = self._bound.get(_digest(session))
        return None if found is None or now_s - found[1] > self._ttl_s else found[0]

    def bind(self, session: str, endpoint: EndpointName, now_s: float) -> None:
        """Note that a session is at an endpoint, and used now."""
        key = _digest(session)
        self._bound.pop(key, None)
        self._bound[key] = (endpoint, now_s)
        if len(self._bound) > self._sessions_max:
            del self._bound[next(iter(self._bound))]
        if now_s - self._swept_s >= self._sweep_s:
            self._sweep(now_s)

    def _sweep(self, now_s: float) -> None:
        self._swept_s = now_s
        expired = []
        for key, (_, used_s) in self._bound.items():
            if now_s - used_s <= self._ttl_s:
                break
            expired.append(key)
        for key in expired:
            del self._bound[key]


def _digest(session: str) -> bytes:
    return hashlib.blake2b(session.encode("utf-8", "surrogatepass"), digest_size=16).digest()
