"""How many queries are in progress: bounded, and off the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from kvatlas.errors import KvatlasError

T = TypeVar("T")


class OverloadedError(KvatlasError):
    """No more queries are taken now; ask again after ``retry_after_s``."""

    def __init__(self, problem: str, retry_after_s: int) -> None:
        self.problem = problem
        self.retry_after_s = retry_after_s
        super().__init__(f"{problem}; retry after {retry_after_s} s")


class Gate:
    """Admits at most ``concurrency_max`` requests at a time and runs their work in threads.

    One event loop uses it, HTTP and gRPC together. A request beyond the bound is refused at once: a queue would only make
    every answer late.
    """

    def __init__(self, concurrency_max: int) -> None:
        self._limit = concurrency_max
        self._used = 0
        self._draining = False
        threads = min(concurrency_max, max(4, os.cpu_count() or 4))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvatlas-query")

    @property
    def draining(self) -> bool:
        """Whether the service is stopping."""
        return self._draining

    @property
    def in_progress(self) -> int:
        """Requests admitted and not finished."""
        return self._used

    def admit(self) -> Slot:
        """Return a slot to be used in a ``with`` block. Raises OverloadedError where there is none."""
        if self._draining:
            raise OverloadedError("the service is stopping", 5)
        if self._used >= self._limit:
            raise OverloadedError(f"{self._limit} queries are in progress (api.concurrencyMax)", 1)
        self._used += 1
        return Slot(self._pool, self._release)

    def drain(self) -> None:
        """Refuse new requests; those in progress go on."""
        self._draining = True

    def close(self) -> None:
        """Give up work that has not begun; return without waiting for the rest."""
        self.drain()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _release(self) -> None:
        self._used -= 1


class Slot:
    """One admitted request. It stays taken until its work has ended, even if nobody waits for the answer any more."""

    def __init__(self, pool: ThreadPoolExecutor, release: Callable[[], None]) -> None:
        self._pool = pool
        self._release = release
        self._work: Future[object] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread and return its result. Cancelling does not stop work that has begun."""
        future = self._pool.submit(work)
        self._work = future  # type: ignore[assignment]  # Future is invariant; only its end matters here
        return await asyncio.wrap_future(future)

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._work is None or self._work.done():
            self._release()
            return
        loop = asyncio.get_running_loop()
        self._work.add_done_callback(lambda _: _call_soon(loop, self._release))


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    if not loop.is_closed():  # the service ended meanwhile, and the count with it
        loop.call_soon_threadsafe(callback)
