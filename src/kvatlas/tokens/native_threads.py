"""Texts to tokens in threads of the native core: an event loop asks, and its mailbox brings the answers.

No Python thread takes part, so nobody waits for the interpreter. Equal prompts in flight are done once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import msgspec

from kvatlas.errors import TokenizationError
from kvatlas.mail import Mail
from kvatlas.tokens.local.backend import NativeWork
from kvatlas.tokens.results import Tokenized
from kvatlas.tokens.segments import NativeFound
from kvatlas.tokens.workers import closed

if TYPE_CHECKING:
    from kvatlas import _native

Told = Callable[[Tokenized, float], None]
"""Is told each prompt's tokens once, and how many seconds they took."""


class _Shared(msgspec.Struct):
    """A prompt in flight."""

    ticket: int
    waiters: list[asyncio.Future[Tokenized | None]]


class NativeThreads:
    """The threads of one event loop. Used in it alone; made by :meth:`here`."""

    def __init__(self, threads: _native.EncoderThreads, mail: Mail, told: Told) -> None:
        self._threads = threads
        self._mail = mail
        self._told = told
        self._loop = asyncio.get_running_loop()
        self._in_flight: dict[Hashable, _Shared] = {}
        self.shared = 0
        """Times that a prompt in flight served a further caller."""

    @classmethod
    def here(cls, threads: int, told: Told) -> NativeThreads:
        """Return threads for the running event loop. ImportError without a native core."""
        from kvatlas import _native

        return cls(_native.EncoderThreads(threads), Mail(_native.Mailbox()), told)

    @property
    def in_flight(self) -> int:
        """Prompts that wait or are worked on."""
        return len(self._in_flight)

    def serves(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether these are an event loop's threads."""
        return self._loop is loop

    def knows(self, key: Hashable) -> bool:
        """Whether a prompt is in flight, so that it costs nothing to ask for it again."""
        return key in self._in_flight

    async def tokens(self, key: Hashable, work: NativeWork, timeout_s: float) -> Tokenized | None:
        """Return a prompt's tokens; None where Python has to say what is wrong with it. TimeoutError after ``timeout_s``; the
        work goes on."""
        shared = self._in_flight.get(key)
        if shared is None:
            shared = self._begin(key, work)
        else:
            self.shared += 1
        waiter: asyncio.Future[Tokenized | None] = self._loop.create_future()
        shared.waiters.append(waiter)
        timer = self._loop.call_later(timeout_s, _give_up, waiter)
        try:
            return await waiter
        finally:
            timer.cancel()

    def close(self) -> None:
        """Begin nothing new; fail what waits. From any thread."""
        self._threads.close()
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits in it
            self._loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        self._mail.close()
        for shared in self._in_flight.values():
            for waiter in shared.waiters:
                if not waiter.done():
                    waiter.set_exception(closed())
        self._in_flight.clear()

    def _begin(self, key: Hashable, work: NativeWork) -> _Shared:
        ticket = self._mail.ticket(lambda letter: self._arrived(key, work, letter))
        shared = self._in_flight[key] = _Shared(ticket, [])
        try:
            self._threads.submit(work.encoder.native, work.text, self._mail.mailbox, ticket)
        except RuntimeError:
            self._end(key)
            raise closed() from None
        return shared

    def _end(self, key: Hashable) -> _Shared:
        shared = self._in_flight.pop(key)
        self._mail.forget(shared.ticket)
        return shared

    def _arrived(self, key: Hashable, work: NativeWork, letter: tuple[NativeFound, float] | str) -> None:
        found = None
        if not isinstance(letter, str):
            with contextlib.suppress(TokenizationError):  # said again by who is asked next
                found = work.answer(work.encoder.told(letter[0]))
                self._told(found, letter[1])
        for waiter in self._end(key).waiters:
            if not waiter.done():
                waiter.set_result(found)


def _give_up(waiter: asyncio.Future[Tokenized | None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())
