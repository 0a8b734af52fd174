"""One tenant's requests that wait, in the order in which they go."""

from __future__ import annotations

import heapq
from collections import OrderedDict

from kvatlas.route.flow.item import Item
from kvatlas.route.flow.policies import OrderingPolicy


class Queue:
    """Adding, taking and removing cost O(log n). Removed items leave the heap later; it holds about twice the items at most."""

    def __init__(self, ordering: OrderingPolicy) -> None:
        self._ordering = ordering
        self._items: OrderedDict[int, Item] = OrderedDict()
        self._heap: list[tuple[float, int]] = []
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: Item) -> None:
        self._items[item.id] = item
        self.size_bytes += item.size_bytes
        heapq.heappush(self._heap, (self._ordering.due_s(item), item.id))

    def pop(self) -> Item:
        """Take the one that goes first."""
        item = self.head()
        heapq.heappop(self._heap)
        return self.remove(item)

    def head(self) -> Item:
        """Return the one that goes first."""
        while self._heap[0][1] not in self._items:
            heapq.heappop(self._heap)
        return self._items[self._heap[0][1]]

    def newest(self) -> Item:
        """Return the one that has waited least."""
        return self._items[next(reversed(self._items))]

    def remove(self, item: Item) -> Item:
        """Take one out, wherever it is."""
        del self._items[item.id]
        self.size_bytes -= item.size_bytes
        if len(self._heap) > 2 * len(self._items) + 16:
            self._heap = [entry for entry in self._heap if entry[1] in self._items]
            heapq.heapify(self._heap)
        return item
