"""Whether to stop, as signals ask for it: once, and at once with the second one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stopping:
    """Whether to stop, and whether to do so without waiting for requests in progress."""

    def __init__(self, asked: asyncio.Event | None = None) -> None:
        self.asked = asked or asyncio.Event()
        self.at_once = asyncio.Event()

    def signal(self) -> None:
        (self.at_once if self.asked.is_set() else self.asked).set()


@contextmanager
def stopping_by(stop: asyncio.Event | None) -> Iterator[Stopping]:
    """Return what ``stop`` asks for; None: what SIGTERM and SIGINT do, in the main thread's event loop."""
    stopping = Stopping(stop)
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT) if stop is None else ()
    for number in numbers:
        loop.add_signal_handler(number, stopping.signal)
    try:
        yield stopping
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
