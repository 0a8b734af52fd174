"""Tokens to come: how a thread or an event loop waits for work that it shares with others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.results import Tokenized
from kvatlas.tokens.workers import closed

STORED_WAIT_S = 0.25
"""How long what a store knows may take to come."""


class PendingTokens:
    """Tokens to come: :meth:`result` waits in a thread, :meth:`wait` in an event loop. Both raise TokenizationError."""

    def __init__(
        self,
        first: Future[Tokenized],
        first_s: float,
        failed: Callable[[TokenizationError], None],
        *,
        then: Callable[[], Future[Tokenized]] | None = None,
    ) -> None:
        """``then``: what is waited for where the first does not come in time. ``failed``: told each failure, once a caller."""
        self._first = first
        self._first_s = first_s
        self._failed = failed
        self._then = then

    def result(self) -> Tokenized:
        """Block until they are there."""
        with counted(self._failed, self._first_s):
            try:
                return self._first.result(self._first_s)
            except TimeoutError:
                if self._then is None:
                    raise
            return self._then().result(STORED_WAIT_S)

    async def wait(self) -> Tokenized:
        """Wait until they are there. Cancelling ends the waiting, not the work."""
        with counted(self._failed, self._first_s):
            try:
                return await _within(self._first, self._first_s)
            except TimeoutError:
                if self._then is None:
                    raise
            return await _within(self._then(), STORED_WAIT_S)


@contextlib.contextmanager
def counted(failed: Callable[[TokenizationError], None], seconds: float) -> Iterator[None]:
    """Turn what ends waiting for ``seconds`` into a TokenizationError, and tell ``failed`` each of them."""
    try:
        yield
    except TokenizationError as error:
        failed(error)
        raise
    except TimeoutError:
        late = too_late(seconds)
        failed(late)
        raise late from None
    except CancelledError:
        gone = closed()
        failed(gone)
        raise gone from None


async def _within(future: Future[Tokenized], seconds: float) -> Tokenized:
    """Wait for shared work: it goes on when the waiting ends."""
    waiting: asyncio.Future[Tokenized] = asyncio.wrap_future(future)
    waiting.add_done_callback(_look_at)
    # not wait_for: before Python 3.12 it forgets a cancellation that comes with the result
    async with asyncio.timeout(seconds):
        return await asyncio.shield(waiting)


def _look_at(future: asyncio.Future[Tokenized]) -> None:
    if not future.cancelled():
        future.exception()  # nobody may be waiting any more


def too_late(timeout_s: float) -> TokenizationError:
    """Return what is said where tokens did not come in time."""
    return TokenizationError(
        TokenizationReason.TIMEOUT,
        "prompt",
        f"its tokens were not there within {timeout_s:g} s",
        "ask again (the work goes on), route without precise scoring, or raise tokens.timeout",
    )
