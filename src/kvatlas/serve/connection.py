"""HTTP connections that must make progress: uvicorn itself waits for a request's headers for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def timed_protocol(headers_timeout_s: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP/1.1 protocol, less the connections whose headers take longer than ``headers_timeout_s``.

    Bodies, answers and idle connections have limits elsewhere: api.requestTimeout and uvicorn's keep-alive.
    """

    class TimedProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_request():
                self._forget_deadline()
            elif self._deadline is None:
                self._expect_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_deadline()
            super().connection_lost(exc)

        def _in_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _expect_headers(self) -> None:
            self._deadline = self.loop.call_later(headers_timeout_s, self._give_up)

        def _forget_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if not self._in_request():
                self.transport.close()

    return TimedProtocol
