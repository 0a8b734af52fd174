"""What the native core's threads have to tell, brought to an event loop in batches.

They put letters into a mailbox without ever taking the interpreter; one wake-up of the loop reads all that came until then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvatlas import _native

Reader = Callable[[Any], None]
"""Is given a letter's content, in the event loop. Must not raise."""


class Mail:
    """One event loop's letters, by ticket: whoever waits for some takes a ticket, and gives it to the core with the work."""

    def __init__(self, mailbox: _native.Mailbox) -> None:
        """Begins to watch; made in the event loop that it belongs to."""
        self.mailbox = mailbox
        self._readers: dict[int, Reader] = {}
        self._tickets = count(1)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(mailbox.fileno(), self.read)

    def ticket(self, reader: Reader) -> int:
        """Return a ticket whose letters a reader gets, until :meth:`forget`."""
        ticket = next(self._tickets)
        self._readers[ticket] = reader
        return ticket

    def forget(self, ticket: int) -> None:
        """Drop a ticket: letters that still come for it are thrown away."""
        self._readers.pop(ticket, None)

    def read(self) -> None:
        """Read all letters that are there."""
        for ticket, content in self.mailbox.take():
            reader = self._readers.get(ticket)
            if reader is not None:
                reader(content)

    def close(self) -> None:
        """Watch no longer."""
        self._loop.remove_reader(self.mailbox.fileno())
        self._readers.clear()
