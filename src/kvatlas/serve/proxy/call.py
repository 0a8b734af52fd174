"""What the proxy asks of an HTTP stack: a client's request, what can be done with it, and what is told of its answer.

There are two: ``native.py`` (in Rust, where the native core is installed) and ``python.py`` (aiohttp). What is decided about a
request is above them, in ``handler.py`` and ``exchange.py``.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Protocol

import msgspec

from kvatlas.route.endpoint import Endpoint
from kvatlas.serve.routing.answers import Usage


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer of the proxy's own."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    close: bool = False
    """Its connection cannot be used again."""


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """A request as an engine is to get it, and how its answer is to be passed on."""

    endpoint: Endpoint
    target: str
    """Path and query."""
    body: bytes
    routing: Mapping[str, str]
    """Headers to set, in place of the client's."""
    reply: Mapping[str, str]
    """Headers to set on the answer."""
    hidden: Collection[str]
    """Headers of the answer that are not for the client."""


class PassEnd(enum.Enum):
    """How the passing of an answer ended."""

    WHOLE = "whole"
    BROKEN = "broken"
    """The engine broke it off, or said nothing for too long."""
    CLIENT_GONE = "client_gone"
    """The client went away, or took nothing for too long."""


class Passed(msgspec.Struct, frozen=True):
    """An answer that was passed on, or a part of it."""

    end: PassEnd
    usage: Usage
    said_done: bool
    """Whether a stream has told its end: clients may leave then, before the answer's last bytes."""
    took_s: float
    """Since the request was sent."""


class Watcher(Protocol):
    """Is told of an answer while it passes."""

    def answered(self, status: int, headers: Mapping[str, str]) -> None:
        """An engine's answer began. ``headers``: by name, in lower case or whatever case."""
        ...

    def first_token(self, ttft_s: float) -> None:
        """The first token passed, so many seconds after the request was sent."""
        ...

    def left(self, passed: Passed) -> None:
        """The passing is cancelled, and this is as far as it came."""
        ...


class ClientCall(Protocol):
    """One client's request. Answered once: by the reply that its handler returns, or by an engine's answer."""

    method: str
    path: str
    """As it came: not decoded."""
    query: str
    headers: dict[str, str]
    """By lower-case name; of equal names the values, joined."""
    problem: str | None
    """Why its length could be read in two ways; None where it can't."""

    async def body(self, bytes_max: int) -> bytes:
        """Return its body. Raises ProxyError for one that is too long, too slow or framed wrongly."""
        ...

    async def forward(self, sent: Sent, watcher: Watcher) -> Passed | None:
        """Send it to an engine and pass the answer on as it comes; return when it has passed.

        An engine that is too busy (503) is told first, and held back: None then, and it can be sent elsewhere, or
        :meth:`pass_held`. Raises UpstreamError where no answer began.
        """
        ...

    async def pass_held(self) -> Passed:
        """Pass the answer on that was held back; its watcher is told on."""
        ...

    def cut(self) -> None:
        """Close its connection at once, so that the client sees that the answer is not whole."""
        ...


Handle = Callable[[ClientCall], Awaitable[Reply | None]]
"""Takes a request to its end. Returns the reply; None where an engine's answer passed. Cancelled where the client left."""


class Stack(Protocol):
    """Listens, and calls engines. Of one event loop."""

    url: str
    """Where it listens, once started."""

    async def start(self, handle: Handle) -> None:
        """Listen. Raises ConfigError where the address cannot be had."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Take no new connections, let requests in progress finish within the grace, then cut them."""
        ...

    async def fetch(self, endpoint: Endpoint, target: str, headers: Mapping[str, str], bytes_max: int) -> tuple[int, bytes]:
        """GET something from an engine; return status and body. Raises UpstreamError, also where it is too long."""
        ...
