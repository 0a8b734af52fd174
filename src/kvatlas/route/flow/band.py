"""The requests of one priority that wait: bounded, their tenants in turn."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from kvatlas.route.flow.item import Item
from kvatlas.route.flow.policies import ChoosesQueue, FairnessPolicy, OrderingPolicy
from kvatlas.route.flow.queue import Queue


class BandPlan(msgspec.Struct, frozen=True):
    """What a band may hold, and who goes first in it."""

    requests_max: int
    bytes_max: int
    fairness: FairnessPolicy
    ordering: OrderingPolicy


class Band:
    """A queue for each tenant that has requests here, and none for others."""

    def __init__(self, plan: BandPlan) -> None:
        self._plan = plan
        self._queues: OrderedDict[str, Queue] = OrderedDict()
        """The first one has the next turn."""
        self.requests = 0
        self.size_bytes = 0
        self.used_s = 0.0
        """When a request last came."""

    @property
    def tenants(self) -> int:
        return len(self._queues)

    def fits(self, item: Item, without: Item | None = None) -> bool:
        """Whether an item may be added, once ``without`` is gone."""
        requests = self.requests + 1 - (without is not None)
        size_bytes = self.size_bytes + item.size_bytes - (0 if without is None else without.size_bytes)
        return requests <= self._plan.requests_max and size_bytes <= self._plan.bytes_max

    def add(self, item: Item) -> None:
        name = self._plan.fairness.queue_of(item)
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = Queue(self._plan.ordering)
        queue.add(item)
        self._count(item, 1)

    def pop(self) -> Item:
        """Take the request that goes next; its tenant's next turn comes after all others'."""
        fairness = self._plan.fairness
        if isinstance(fairness, ChoosesQueue):
            name = fairness.next_queue({name: queue.head() for name, queue in self._queues.items()})
        else:
            name = next(iter(self._queues))
        queue = self._queues[name]
        item = queue.pop()
        self._queues.move_to_end(name)
        self._taken(name, queue, item)
        return item

    def remove(self, item: Item) -> None:
        name = self._plan.fairness.queue_of(item)
        queue = self._queues[name]
        self._taken(name, queue, queue.remove(item))

    def least_entitled(self) -> Item:
        """Return the newest request of the tenant that holds most."""
        return max(self._queues.values(), key=self._share).newest()

    def displaced_by(self, item: Item) -> Item | None:
        """Return who makes room in a full band: the newest request of the tenant that holds most.

        None where that tenant would then hold less than the item's tenant does with it: nobody's share is unfair then.
        """
        if not self._queues:
            return None
        mine = self._queues.get(self._plan.fairness.queue_of(item))
        most = max(self._queues.values(), key=self._share)
        victim = most.newest()
        if most is mine or self._share(most, victim, -1) < self._share(mine, item, 1):
            return None
        return victim

    def _share(self, queue: Queue | None, item: Item | None = None, sign: int = 0) -> float:
        """Return how much of the band a queue holds, of requests or bytes, whichever is more; with or without an item."""
        requests = sign + (0 if queue is None else len(queue))
        size_bytes = (0 if queue is None else queue.size_bytes) + (0 if item is None else sign * item.size_bytes)
        return max(requests / self._plan.requests_max, size_bytes / self._plan.bytes_max)

    def _taken(self, name: str, queue: Queue, item: Item) -> None:
        if not queue:
            del self._queues[name]
        self._count(item, -1)

    def _count(self, item: Item, sign: int) -> None:
        self.requests += sign
        self.size_bytes += sign * item.size_bytes
