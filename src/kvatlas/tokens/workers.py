"""Threads that tokenize off the request path: a bounded queue, and equal work done once however many ask for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from kvatlas.errors import TokenizationError, TokenizationReason

T = TypeVar("T")


class Workers(Generic[T]):
    """Runs work in threads. Work with the key of one that waits or runs is not begun again: both get its result."""

    def __init__(self, threads: int, queue_max: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._room = threads + queue_max
        self._lock = threading.Lock()
        self._in_flight: dict[Hashable, Future[T]] = {}
        self.shared = 0
        """Times that work in flight served a further caller."""

    @property
    def in_flight(self) -> int:
        """Pieces of work that wait or run."""
        return len(self._in_flight)

    def submit(self, key: Hashable, work: Callable[[], T]) -> Future[T]:
        """Return the result to come. It is shared: do not cancel it. TokenizationError (busy) where too much waits."""
        with self._lock:
            known = self._in_flight.get(key)
            if known is not None:
                self.shared += 1
                return known
            if len(self._in_flight) >= self._room:
                raise too_many(self._room)
            future: Future[T] = Future()
            self._in_flight[key] = future
        try:
            self._pool.submit(self._run, key, future, work)
        except RuntimeError:  # closed meanwhile
            self._end(key)
            raise closed() from None
        return future

    def close(self) -> None:
        """Begin nothing new, fail what waits; return without waiting for what runs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            waiting = [future for future in self._in_flight.values() if not future.running() and not future.done()]
            self._in_flight.clear()
        for future in waiting:
            future.cancel()

    def _run(self, key: Hashable, future: Future[T], work: Callable[[], T]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work()
        except BaseException as error:
            self._end(key)
            future.set_exception(error)
        else:
            self._end(key)
            future.set_result(result)

    def _end(self, key: Hashable) -> None:
        with self._lock:
            self._in_flight.pop(key, None)


def too_many(room: int) -> TokenizationError:
    """Return what is said where no more than ``room`` prompts may wait."""
    problem = f"{room} prompts are tokenized or wait for it (tokens.queueMax)"
    return TokenizationError(TokenizationReason.BUSY, "prompt", problem, "ask again later, or route without precise scoring")


def closed() -> TokenizationError:
    """Return what is said after the end."""
    return TokenizationError(TokenizationReason.BUSY, "prompt", "the tokenizer is closed", "start it again")
