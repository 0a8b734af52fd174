"""Requests wait within bounds, go by priority and in turn, and each of them ends once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.flow.band import BandPlan
from kvatlas.route.flow.item import Item
from kvatlas.route.flow.plan import FlowPlan
from kvatlas.route.flow.policies import (
    EdfOrdering,
    FcfsOrdering,
    GlobalStrictFairness,
    RoundRobinFairness,
    SloDeadlineOrdering,
)
from kvatlas.route.flow.usage_limits import PriorityHoldback
from kvatlas.route.flow.waiting_room import BANDS_MAX, WaitingRoom
from tests.unit.route.flow.fleet import one_band, plugin

ROUND_ROBIN = plugin(RoundRobinFairness)
STRICT = plugin(GlobalStrictFairness)
FCFS = plugin(FcfsOrdering)


def plan(
    requests_max: int = 100,
    bytes_max: int = 10_000,
    fairness: Any = ROUND_ROBIN,
    ordering: Any = FCFS,
    **more: Any,
) -> FlowPlan:
    """``requests_max`` and ``bytes_max`` are those of a band."""
    return one_band(BandPlan(requests_max, bytes_max, fairness, ordering), **more)


def room(*arguments: Any, **more: Any) -> WaitingRoom:
    return WaitingRoom(plan(*arguments, **more))


def items() -> Callable[..., Item]:
    """Return what makes items with ids that rise: tenant, priority, and what else is given."""
    count = 0

    def make(tenant: str = "t", priority: int = 0, at: float = 0.0, size: int = 1, **more: Any) -> Item:
        nonlocal count
        count += 1
        return Item(id=count, priority=priority, tenant=tenant, size_bytes=size, arrived_s=at, **more)

    return make


def fill(waiting: WaitingRoom, *offered: Item) -> None:
    for item in offered:
        assert waiting.offer(item, item.arrived_s).taken


def drained(waiting: WaitingRoom, saturation: float = 0.5) -> list[Item]:
    found = []
    while (item := waiting.pop(saturation, 0.0)) is not None:
        found.append(item)
    return found


def test_higher_priorities_go_first() -> None:
    waiting, item = room(), items()
    fill(waiting, low := item(priority=-1), middle := item(), high := item(priority=7))
    assert drained(waiting) == [high, middle, low]


def test_nothing_goes_while_the_pool_is_busy() -> None:
    waiting, item = room(), items()
    fill(waiting, item())
    assert waiting.pop(1.0, 0.0) is None
    assert waiting.pop(0.99, 0.0) is not None


def test_tenants_take_turns_however_much_they_ask() -> None:
    waiting, item = room(), items()
    fill(waiting, *(item("loud") for _ in range(4)), item("quiet"), item("soft"))
    assert "".join(one.tenant[0] for one in drained(waiting)) == "lqslll"


def test_without_turns_a_band_is_one_queue() -> None:
    waiting, item = room(fairness=STRICT), items()
    fill(waiting, *(offered := [item("loud"), item("loud"), item("quiet")]))
    assert drained(waiting) == offered


def test_a_tenant_who_asks_again_waits_for_its_turn() -> None:
    waiting, item = room(), items()
    fill(waiting, item("a"), item("b"), item("b"))
    assert waiting.pop(0.0, 0.0).tenant == "a"  # type: ignore[union-attr]
    fill(waiting, item("a"))
    assert [one.tenant for one in drained(waiting)] == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("ordering", "order"),
    [(FcfsOrdering, [1, 2, 3, 4]), (EdfOrdering, [3, 1, 2, 4]), (SloDeadlineOrdering, [4, 2, 1, 3])],
)
def test_one_tenants_requests_go_in_the_order_of_the_policy(ordering: Any, order: list[int]) -> None:
    waiting, item = room(ordering=plugin(ordering)), items()
    fill(
        waiting, item(deadline_s=9.0), item(at=1.0, ttft_slo_s=3.0), item(at=1.0, deadline_s=8.0), item(at=2.0, ttft_slo_s=1.0)
    )
    assert [one.id for one in drained(waiting)] == order


def test_a_lower_priority_stops_earlier_where_room_is_held_back() -> None:
    waiting, item = room(usage_limit=plugin(PriorityHoldback, minCeiling=0.5)), items()
    fill(waiting, item(priority=1), item(priority=0))
    assert [one.priority for one in drained(waiting, 0.7)] == [1]
    assert len(waiting) == 1
    assert [one.priority for one in drained(waiting, 0.4)] == [0]


def test_a_priority_that_nobody_uses_any_more_holds_nobody_back() -> None:
    waiting, item = room(usage_limit=plugin(PriorityHoldback, minCeiling=0.5)), items()
    fill(waiting, item(priority=1), item(priority=0))
    assert waiting.pop(0.7, 599.0).priority == 1  # type: ignore[union-attr]
    assert waiting.pop(0.7, 599.0) is None
    assert waiting.pop(0.7, 601.0).priority == 0  # type: ignore[union-attr]


def test_a_full_band_refuses_who_has_no_smaller_share() -> None:
    waiting, item = room(requests_max=4), items()
    fill(waiting, item("a"), item("a"), item("b"), item("b"))
    assert not waiting.offer(item("a"), 0.0).taken
    assert not waiting.offer(item("b"), 0.0).taken


def test_a_full_band_makes_room_for_a_smaller_tenant_at_the_cost_of_the_largest() -> None:
    waiting, item = room(requests_max=4), items()
    fill(waiting, *(flood := [item("loud") for _ in range(4)]))
    offer = waiting.offer(item("quiet"), 0.0)
    assert offer.taken
    assert offer.displaced == flood[-1]
    assert waiting.offer(item("quiet"), 0.0).taken
    assert not waiting.offer(item("quiet"), 0.0).taken
    assert len(waiting) == 4


def test_shares_are_of_bytes_where_those_are_scarce() -> None:
    waiting, item = room(bytes_max=100), items()
    fill(waiting, *(big := [item("big", size=20) for _ in range(4)]), *(item("small", size=2) for _ in range(5)))
    offer = waiting.offer(item("small", size=11), 0.0)
    assert offer.taken
    assert offer.displaced == big[-1]
    assert not waiting.offer(item("huge", size=101), 0.0).taken


def test_the_lowest_priority_makes_room_where_all_bands_together_are_full() -> None:
    waiting, item = WaitingRoom(msgspec.structs.replace(plan(), requests_max=3)), items()
    fill(waiting, low := item(priority=-1), item(), item(priority=5))
    offer = waiting.offer(item(priority=1), 0.0)
    assert offer.taken
    assert offer.displaced == low
    assert not waiting.offer(item(priority=-1), 0.0).taken


def test_only_so_many_priorities_wait_at_a_time() -> None:
    waiting, item = room(), items()
    fill(waiting, *(item(priority=priority) for priority in range(BANDS_MAX)))
    assert not waiting.offer(item(priority=-5), 0.0).taken
    assert waiting.pop(0.0, 0.0) is not None
    assert waiting.offer(item(priority=-5), 0.0).taken
    assert len(waiting.stats()) == BANDS_MAX


def test_a_request_waits_for_as_long_as_it_may() -> None:
    waiting, item = room(ttl_s=60.0), items()
    fill(waiting, first := item(at=0.0), second := item(at=5.0))
    assert waiting.next_wakeup() == 60.0
    assert waiting.expire(59.9) == []
    assert waiting.expire(60.0) == [first]
    assert waiting.next_wakeup() == 65.0
    assert waiting.expire(70.0) == [second]
    assert waiting.next_wakeup() is None


def test_a_request_with_an_earlier_deadline_ends_then() -> None:
    waiting, item = room(ttl_s=60.0), items()
    fill(waiting, item(at=0.0), hasty := item(at=0.0, deadline_s=2.0))
    assert waiting.next_wakeup() == 2.0
    assert waiting.expire(2.0) == [hasty]
    assert waiting.next_wakeup() == 60.0


def test_without_a_time_limit_requests_stay() -> None:
    waiting, item = room(ttl_s=None, no_endpoint_ttl_s=None), items()
    fill(waiting, item())
    assert waiting.next_wakeup() is None
    assert waiting.expire(1e9) == []


def test_an_endpoint_that_comes_starts_the_other_time_limit() -> None:
    waiting, item = room(ttl_s=10.0, no_endpoint_ttl_s=600.0), items()
    waiting.pool_is(empty=True, now_s=0.0)
    fill(waiting, item(at=0.0))
    assert waiting.pop(0.0, 1.0) is None
    assert waiting.next_wakeup() == 600.0
    waiting.pool_is(empty=False, now_s=300.0)
    assert waiting.next_wakeup() == 310.0


def test_a_pool_that_comes_and_goes_keeps_nobody_for_longer_than_the_longer_limit() -> None:
    waiting, item = room(ttl_s=10.0, no_endpoint_ttl_s=20.0), items()
    fill(waiting, only := item(at=0.0))
    for now_s in range(5, 20):
        waiting.pool_is(empty=now_s % 2 == 0, now_s=now_s)
        assert waiting.expire(now_s) == []
    assert waiting.expire(20.0) == [only]


def test_who_is_gone_leaves_nothing_behind() -> None:
    waiting, item = room(), items()
    fill(waiting, gone := item("a", size=5), item("b", size=3))
    assert waiting.remove(gone)
    assert not waiting.remove(gone)
    (band,) = waiting.stats()
    assert (band.requests, band.bytes, band.tenants) == (1, 3, 1)
    assert [one.tenant for one in waiting.clear()] == ["b"]
    assert (len(waiting), waiting.size_bytes, waiting.stats()[0].tenants) == (0, 0, 0)


OFFER = st.tuples(
    st.just("offer"),
    st.sampled_from("abc"),
    st.integers(-1, 1),
    st.integers(1, 6),
    st.sampled_from([math.inf, math.inf, 3.0, 8.0]),
)
STEPS = st.lists(
    st.one_of(
        OFFER,
        OFFER,
        st.tuples(st.just("pop")),
        st.tuples(st.just("gone"), st.integers(0, 30)),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 2.0, 7.0])),
        st.tuples(st.just("pool"), st.booleans()),
    ),
    max_size=120,
)


class Walk:
    """Steps on a waiting room, and on a list of what waits: what has to be true after each of them."""

    def __init__(self, bands: FlowPlan) -> None:
        self.plan = bands
        self.room = WaitingRoom(bands)
        self.make = items()
        self.now_s = 0.0
        self.offered: list[Item] = []
        self.waiting: list[Item] = []
        self.ends: Counter[int] = Counter()
        self.turns: Counter[tuple[int, str, str]] = Counter()
        """By priority, who waits, and whose turns: since the former's last one, or since it began to wait."""

    def offer(self, tenant: str, priority: int, size_bytes: int, patience_s: float) -> None:
        item = self.make(tenant, priority, self.now_s, size_bytes, deadline_s=self.now_s + patience_s)
        self.offered.append(item)
        offer = self.room.offer(item, self.now_s)
        if offer.displaced is not None:
            assert offer.taken
            assert offer.displaced.priority <= priority
            self.end(offer.displaced)
        if offer.taken:
            self.waiting.append(item)
        else:
            self.end(item)

    def pop(self) -> None:
        item = self.room.pop(0.5, self.now_s)
        if item is None:
            assert self.room.empty_pool or not self.waiting
            return
        assert item.priority == max(one.priority for one in self.waiting), "a lower priority went first"
        band = [one for one in self.waiting if one.priority == item.priority]
        assert item == next(one for one in band if one.tenant == item.tenant), "not the tenant's first"
        for other in {one.tenant for one in band} - {item.tenant}:
            self.turns[item.priority, other, item.tenant] += 1
            assert self.turns[item.priority, other, item.tenant] <= 1, f"{item.tenant} had two turns while {other} waited"
        self.begin_turns(item)
        self.end(item)

    def gone(self, number: int) -> None:
        if self.offered:
            item = self.offered[number % len(self.offered)]
            assert self.room.remove(item) == (item in self.waiting)
            if item in self.waiting:
                self.end(item)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        for item in self.room.expire(self.now_s):
            assert self.now_s >= min(item.arrived_s + 4.0, item.deadline_s)
            self.end(item)
        assert all(self.now_s < min(item.arrived_s + 10.0, item.deadline_s) for item in self.waiting)
        wakeup_s = self.room.next_wakeup()
        assert (wakeup_s is None) == (not self.waiting)
        assert wakeup_s is None or wakeup_s > self.now_s

    def pool(self, empty: bool) -> None:
        self.room.pool_is(empty=empty, now_s=self.now_s)

    def check(self) -> None:
        stats = self.room.stats()
        assert len(self.room) == len(self.waiting) == sum(band.requests for band in stats)
        assert self.room.size_bytes == sum(item.size_bytes for item in self.waiting) == sum(band.bytes for band in stats)
        for band in stats:
            here = [item for item in self.waiting if item.priority == band.priority]
            assert band.tenants == len({item.tenant for item in here})
            assert band.requests == len(here) <= self.plan.default_band.requests_max
            assert band.bytes <= self.plan.default_band.bytes_max
        assert len(self.room) <= (self.plan.requests_max or math.inf)
        assert self.room.size_bytes <= (self.plan.bytes_max or math.inf)

    def close(self) -> None:
        for item in self.room.clear():
            self.end(item)
        assert self.waiting == []
        assert self.ends == Counter(item.id for item in self.offered), "each item ends once"

    def end(self, item: Item) -> None:
        self.ends[item.id] += 1
        if item in self.waiting:
            self.waiting.remove(item)
        if not any(one.tenant == item.tenant and one.priority == item.priority for one in self.waiting):
            self.begin_turns(item)

    def begin_turns(self, item: Item) -> None:
        for key in [key for key in self.turns if key[:2] == (item.priority, item.tenant)]:
            del self.turns[key]


@given(STEPS, st.integers(1, 8), st.integers(6, 40), st.integers(1, 12) | st.none(), st.integers(10, 50) | st.none())
def test_bounds_priorities_turns_and_ends_hold_whatever_happens(
    steps: list[Any], requests_max: int, bytes_max: int, all_requests_max: int | None, all_bytes_max: int | None
) -> None:
    bands = plan(requests_max, bytes_max, ttl_s=10.0, no_endpoint_ttl_s=4.0)
    walk = Walk(msgspec.structs.replace(bands, requests_max=all_requests_max, bytes_max=all_bytes_max))
    for name, *arguments in steps:
        getattr(walk, name)(*arguments)
        walk.check()
    walk.close()
