"""Where requests wait while the pool is busy: bands by priority, bounds, time limits. No clock and no waiting of its own.

An item that was offered ends once: it is refused or displaced by an offer, popped, expired, or removed.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict

import msgspec

from kvatlas.route.flow.band import Band
from kvatlas.route.flow.item import Item
from kvatlas.route.flow.plan import FlowPlan

BANDS_MAX = 64
"""Priorities that are known at a time, beside those of the configuration; a further one is refused while all of them wait."""
BAND_IDLE_S = 600.0
"""A priority that nobody used for so long does not count among those in use. Source: llm-d-router, flow registry."""


class Offer(msgspec.Struct, frozen=True):
    """What became of an offered item, and of another one because of it."""

    taken: bool
    displaced: Item | None = None
    """Who had to go to make room."""


class BandStats(msgspec.Struct, frozen=True):
    """What waits in one band."""

    priority: int
    requests: int
    bytes: int
    tenants: int


class WaitingRoom:
    """Strict priority between bands. Where there is no room, who is least entitled to it goes."""

    def __init__(self, plan: FlowPlan) -> None:
        self._plan = plan
        self._bands: dict[int, Band] = {priority: Band(band) for priority, band in plan.bands.items()}
        self._arrivals: OrderedDict[int, Item] = OrderedDict()
        self._deadlines: list[tuple[float, int]] = []
        self._bytes = 0
        self._empty_pool = False
        self._since_s = -math.inf

    def __len__(self) -> int:
        return len(self._arrivals)

    @property
    def size_bytes(self) -> int:
        return self._bytes

    @property
    def empty_pool(self) -> bool:
        """Whether what waits, waits for an endpoint to appear."""
        return self._empty_pool

    def stats(self) -> tuple[BandStats, ...]:
        """Return what waits, by priority, highest first."""
        bands = sorted(self._bands.items(), reverse=True)
        return tuple(BandStats(priority, band.requests, band.size_bytes, band.tenants) for priority, band in bands)

    def pool_is(self, *, empty: bool, now_s: float) -> None:
        """Say whether there is an endpoint. A change gives those who wait the other time limit, from now on."""
        if empty != self._empty_pool:
            self._empty_pool = empty
            self._since_s = now_s

    def offer(self, item: Item, now_s: float) -> Offer:
        """Take an item in, or refuse it."""
        band = self._band(item.priority, now_s)
        if band is None:
            return Offer(taken=False)
        band.used_s = now_s
        victim = None
        if not band.fits(item):
            victim = band.displaced_by(item)
        elif not self._fits(item):
            victim = self._displaced_by(item, band)
        own = victim if victim is not None and victim.priority == item.priority else None
        if not (band.fits(item, own) and self._fits(item, victim)):
            return Offer(taken=False)
        if victim is not None:
            self.remove(victim)
        band.add(item)
        self._arrivals[item.id] = item
        self._bytes += item.size_bytes
        if item.deadline_s < math.inf:
            heapq.heappush(self._deadlines, (item.deadline_s, item.id))
        return Offer(taken=True, displaced=victim)

    def pop(self, saturation: float, now_s: float) -> Item | None:
        """Take the one item that may go now; None where none may. Ask again with the saturation that it leads to.

        A priority over its ceiling holds lower ones back too, so that they can't take what it waits for.
        """
        if not self._arrivals or self._empty_pool:
            return None
        priorities = self._in_use(now_s)
        for priority, ceiling in zip(priorities, self._plan.usage_limit.ceilings(saturation, priorities), strict=True):
            if saturation >= ceiling:
                return None
            if self._bands[priority].requests:
                item = self._bands[priority].pop()
                self._forget(item)
                return item
        return None

    def expire(self, now_s: float) -> list[Item]:
        """Take out whose time is over."""
        over = []
        while (item := self._first_due()) is not None and self._due_s(item) <= now_s:
            over.append(item)
            self.remove(item)
        return over

    def next_wakeup(self) -> float | None:
        """Return when the next item's time is over; None where no such time is known."""
        item = self._first_due()
        due_s = math.inf if item is None else self._due_s(item)
        return None if due_s == math.inf else due_s

    def remove(self, item: Item) -> bool:
        """Take an item out (its client is gone). False where it does not wait any more."""
        if item.id not in self._arrivals:
            return False
        self._bands[item.priority].remove(item)
        self._forget(item)
        return True

    def clear(self) -> list[Item]:
        """Take all out."""
        items = list(self._arrivals.values())
        for item in items:
            self.remove(item)
        return items

    def _band(self, priority: int, now_s: float) -> Band | None:
        band = self._bands.get(priority)
        if band is not None:
            return band
        others = [known for known in self._bands if known not in self._plan.bands]
        if len(others) >= BANDS_MAX:
            idle = [known for known in others if not self._bands[known].requests]
            if not idle:
                return None
            del self._bands[min(idle, key=lambda known: self._bands[known].used_s)]
        band = self._bands[priority] = Band(self._plan.band(priority))
        return band

    def _in_use(self, now_s: float) -> list[int]:
        return sorted(
            (
                priority
                for priority, band in self._bands.items()
                if priority in self._plan.bands or band.requests or now_s - band.used_s < BAND_IDLE_S
            ),
            reverse=True,
        )

    def _fits(self, item: Item, without: Item | None = None) -> bool:
        requests = len(self._arrivals) + 1 - (without is not None)
        size_bytes = self._bytes + item.size_bytes - (0 if without is None else without.size_bytes)
        return requests <= (self._plan.requests_max or math.inf) and size_bytes <= (self._plan.bytes_max or math.inf)

    def _displaced_by(self, item: Item, band: Band) -> Item | None:
        """Return who makes room where all bands together are full: of the lowest priority that waits, else of its own."""
        lowest = min((priority for priority, other in self._bands.items() if other.requests), default=item.priority)
        return self._bands[lowest].least_entitled() if lowest < item.priority else band.displaced_by(item)

    def _first_due(self) -> Item | None:
        """Return whose time is over first: who came first, for limits are the same for all, or who has an early deadline."""
        while self._deadlines and self._deadlines[0][1] not in self._arrivals:
            heapq.heappop(self._deadlines)
        if not self._arrivals:
            return None
        oldest = next(iter(self._arrivals.values()))
        if not self._deadlines or self._due_s(oldest) <= self._deadlines[0][0]:
            return oldest
        return self._arrivals[self._deadlines[0][1]]

    def _due_s(self, item: Item) -> float:
        """Return when an item's time is over: its deadline, or its limit since it came or since endpoints came or went.

        However often they do, it does not wait for longer than the longer limit.
        """
        ttl_s, other_s = self._plan.ttl_s or math.inf, self._plan.no_endpoint_ttl_s or math.inf
        limit_s = other_s if self._empty_pool else ttl_s
        return min(item.deadline_s, max(item.arrived_s, self._since_s) + limit_s, item.arrived_s + max(ttl_s, other_s))

    def _forget(self, item: Item) -> None:
        del self._arrivals[item.id]
        self._bytes -= item.size_bytes
        if len(self._deadlines) > 2 * len(self._arrivals) + 16:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._arrivals]
            heapq.heapify(self._deadlines)
