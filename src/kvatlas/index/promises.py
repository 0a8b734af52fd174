"""Speculative entries: blocks that a stream was promised, because a request for them was sent there."""

from __future__ import annotations

import heapq
from collections.abc import Set

from kvatlas.types import BlockKey, Stream


class Promises:
    """Each ends by its event or by its time; ``promises_max`` bounds them, and the one that ends first is given up."""

    def __init__(self, promises_max: int) -> None:
        self._promises_max = promises_max
        self._ends_s: dict[BlockKey, dict[Stream, float]] = {}
        self._queue: list[tuple[float, BlockKey, Stream]] = []
        """By end; a promise that was renewed or kept stays in here until its first end."""

    def __len__(self) -> int:
        return sum(len(streams) for streams in self._ends_s.values())

    @property
    def records(self) -> int:
        """How many records are held, for accounting."""
        return len(self._queue)

    def of(self, key: BlockKey) -> Set[Stream]:
        """Return the streams that were promised a block."""
        return self._ends_s.get(key, {}).keys()

    def make(self, key: BlockKey, stream: Stream, end_s: float) -> None:
        self._ends_s.setdefault(key, {})[stream] = end_s
        heapq.heappush(self._queue, (end_s, key, stream))
        while len(self._queue) > self._promises_max:
            self.give_up_next()

    def keep(self, key: BlockKey, stream: Stream) -> None:
        """The block has come (or its time is up): the promise is no more."""
        streams = self._ends_s.get(key)
        if streams is not None:
            streams.pop(stream, None)
            if not streams:
                del self._ends_s[key]

    def expire(self, now_s: float) -> None:
        while self._queue and self._queue[0][0] <= now_s:
            self.give_up_next()

    def give_up_next(self) -> None:
        """End the promise that would end next."""
        end_s, key, stream = heapq.heappop(self._queue)
        if self._ends_s.get(key, {}).get(stream) == end_s:
            self.keep(key, stream)
