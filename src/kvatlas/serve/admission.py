"""When a request may be decided: an event loop's front of the waiting room.

    await admission.admit(request, len(body))
    flight = router.decide(request)  # before anything else is awaited, so that the next one sees it in flight

Events move what waits: a request ended, an engine reported, endpoints came or went (:meth:`Admission.changed`), or a time limit
ended. Nothing is polled.
"""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from kvatlas.errors import ExpiredError, NoEndpointError, RouteError, SaturatedError, StoppingError
from kvatlas.route.cycle import Candidate
from kvatlas.route.flow.item import Item
from kvatlas.route.flow.plan import detector_of, plan_of
from kvatlas.route.flow.pool import PoolGauge
from kvatlas.route.flow.saturation import SaturationDetector
from kvatlas.route.flow.settings import FlowControl
from kvatlas.route.flow.waiting_room import BandStats, WaitingRoom
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Router


class AdmissionEnd(enum.Enum):
    """What became of a request that asked for admission."""

    ADMITTED = "admitted"
    SHED = "shed"
    """Without flow control: its priority is below 0 and the pool is busy."""
    FULL = "full"
    """No room to wait in, or somebody was more entitled to it."""
    EXPIRED = "expired"
    """It waited for as long as it may while the pool was busy."""
    NO_ENDPOINTS = "no_endpoints"
    """There was no room, or its time ended, while there was no endpoint."""
    CANCELLED = "cancelled"
    STOPPED = "stopped"


class AdmissionStats(msgspec.Struct, frozen=True):
    """What waits, and what became of those that did."""

    bands: tuple[BandStats, ...]
    ends: dict[AdmissionEnd, int]
    """Since the start."""
    saturation: float | None
    """As of the last look; None: nobody was there, or nobody looked."""


class AdmissionObserver(Protocol):
    """Learns of every request that asked for admission, once."""

    def ended(self, priority: int, end: AdmissionEnd, waited_s: float) -> None: ...


class TimerHandle(Protocol):
    """As of ``loop.call_later``."""

    def cancel(self) -> None: ...


_DISPLACED = "its room to wait in was needed for others"

Timer = Callable[[float, Callable[[], None]], TimerHandle]
"""Calls back after so many seconds."""


def admission_of(
    router: Router,
    settings: FlowControl,
    *,
    flow_control: bool,
    clock: Callable[[], float] = time.monotonic,
    observer: AdmissionObserver | None = None,
) -> Admission:
    """Return the admission that a configuration asks for. ``flow_control``: its feature gate; ``clock``: the router's.

    Raises ConfigError where the section names plugins that do something else.
    """
    room = WaitingRoom(plan_of(settings, router.plugin)) if flow_control else None
    return Admission(detector_of(settings, router.plugin), router.candidates, clock, room=room, observer=observer)


class Admission:
    """Admits requests one by one; each one counts before the next is looked at. Of one event loop, not thread-safe."""

    def __init__(
        self,
        detector: SaturationDetector,
        candidates: Callable[[], Sequence[Candidate]],
        clock: Callable[[], float],
        *,
        room: WaitingRoom | None = None,
        observer: AdmissionObserver | None = None,
        timer: Timer | None = None,
    ) -> None:
        """``candidates``: the pool as it is now; ``clock``: the router's.

        ``room``: None without flow control. ``timer``: by default the running event loop's ``call_later``.
        """
        self._gauge = PoolGauge(detector)
        self._candidates = candidates
        self._clock = clock
        self._room = room
        self._observer = observer
        self._timer = timer
        self._alarm: TimerHandle | None = None
        self._alarm_s = math.inf
        self._waiting: dict[int, tuple[Item, asyncio.Future[None]]] = {}
        self._last_id = 0
        self._turn_comes = False
        self._closed = False
        self._saturation: float | None = None
        self._ends: Counter[AdmissionEnd] = Counter()

    def stats(self) -> AdmissionStats:
        """Return what waits now, and what became of those before."""
        return AdmissionStats(() if self._room is None else self._room.stats(), dict(self._ends), self._saturation)

    async def admit(self, request: RouteRequest, body_bytes: int, deadline_s: float = math.inf) -> None:
        """Return when the request may be decided; do that before awaiting anything else.

        ``deadline_s``: when its client gives up, on the router's clock. Cancelling gives its place up. Raises SaturatedError,
        ExpiredError, NoEndpointError or StoppingError.
        """
        now_s = self._clock()
        if self._closed:
            self._count(request.priority, AdmissionEnd.STOPPED, 0.0)
            raise StoppingError()
        if self._room is None:
            self._shed_if_busy(request, now_s)
            return
        item = self._item(request, body_bytes, now_s, deadline_s)
        future = self._offer(self._room, item, now_s)
        try:
            await future
        except asyncio.CancelledError:
            if self._room.remove(item):
                self._waiting.pop(item.id)
                self._count(item.priority, AdmissionEnd.CANCELLED, self._clock() - item.arrived_s)
            elif not future.cancelled():
                future.exception()  # nobody is left to be told of a refusal
            raise

    def changed(self) -> None:
        """Look again: a request ended, an engine reported, or endpoints came or went."""
        if self._waiting:
            self._soon()

    def close(self) -> None:
        """Refuse what waits and what comes."""
        self._closed = True
        self._set_alarm(None)
        if self._room is not None:
            for item in self._room.clear():
                self._end(item, AdmissionEnd.STOPPED, StoppingError())

    def _shed_if_busy(self, request: RouteRequest, now_s: float) -> None:
        if request.priority < 0:
            candidates = [one for one in self._candidates() if request.allows(one.endpoint)]
            self._saturation = self._gauge.saturation(candidates, now_s)
            if self._saturation is not None and self._saturation >= 1.0:  # where nobody is there, deciding says so
                self._count(request.priority, AdmissionEnd.SHED, 0.0)
                raise SaturatedError(f"the endpoints are busy (saturation {self._saturation:.2f}), and the priority is below 0")
        self._count(request.priority, AdmissionEnd.ADMITTED, 0.0)

    def _item(self, request: RouteRequest, body_bytes: int, now_s: float, deadline_s: float) -> Item:
        self._last_id += 1
        return Item(
            id=self._last_id,
            priority=request.priority,
            tenant=request.fairness_id,
            size_bytes=body_bytes,
            arrived_s=now_s,
            deadline_s=deadline_s,
            ttft_slo_s=request.ttft_slo_s,
        )

    def _offer(self, room: WaitingRoom, item: Item, now_s: float) -> asyncio.Future[None]:
        """Return a future that is done when the item's wait ends; at once where nobody waits and the pool is not busy."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[item.id] = (item, future)
        offer = room.offer(item, now_s)
        if offer.displaced is not None or not offer.taken:
            self._look(room, now_s)
            loser, why = (item, "no room to wait in is left") if offer.displaced is None else (offer.displaced, _DISPLACED)
            self._end(loser, *self._refusal(room, why))
        if self._turn_comes or len(room) > 1:
            self._soon()
        else:  # whoever called goes on, and decides, before anybody else asks
            self._advance(room)
        return future

    def _soon(self) -> None:
        if not self._turn_comes:
            self._turn_comes = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Admit one request at most. It decides before the next turn: its task was woken up first."""
        self._turn_comes = False
        if self._room is not None and not self._closed and self._advance(self._room):
            self._soon()

    def _advance(self, room: WaitingRoom) -> bool:
        """Refuse whose time is over; return whether somebody was admitted."""
        now_s = self._clock()
        saturation = self._look(room, now_s)
        for item in room.expire(now_s):
            self._end(item, *self._expiry(room, now_s - item.arrived_s))
        admitted = None if saturation is None else room.pop(saturation, now_s)
        if admitted is not None:
            self._gauge.sent(now_s)
            self._end(admitted, AdmissionEnd.ADMITTED, None)
        self._set_alarm(room.next_wakeup())
        return admitted is not None

    def _look(self, room: WaitingRoom, now_s: float) -> float | None:
        self._saturation = self._gauge.saturation(self._candidates(), now_s)
        room.pool_is(empty=self._saturation is None, now_s=now_s)
        return self._saturation

    def _refusal(self, room: WaitingRoom, problem: str) -> tuple[AdmissionEnd, RouteError]:
        if room.empty_pool:
            return AdmissionEnd.NO_ENDPOINTS, NoEndpointError(f"nobody is there to take the request, and {problem}")
        return AdmissionEnd.FULL, SaturatedError(f"the endpoints are busy, and {problem}")

    def _expiry(self, room: WaitingRoom, waited_s: float) -> tuple[AdmissionEnd, RouteError]:
        if room.empty_pool:
            return AdmissionEnd.NO_ENDPOINTS, NoEndpointError(f"no endpoint came while the request waited {waited_s:.1f} s")
        return AdmissionEnd.EXPIRED, ExpiredError(f"the endpoints were busy while the request waited {waited_s:.1f} s")

    def _end(self, item: Item, end: AdmissionEnd, error: RouteError | None) -> None:
        _, future = self._waiting.pop(item.id)
        if future.done():  # cancelled, and its task will not look for more
            end = AdmissionEnd.CANCELLED
        elif error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
        self._count(item.priority, end, self._clock() - item.arrived_s)

    def _count(self, priority: int, end: AdmissionEnd, waited_s: float) -> None:
        self._ends[end] += 1
        if self._observer is not None:
            self._observer.ended(priority, end, waited_s)

    def _set_alarm(self, at_s: float | None) -> None:
        """Have a turn when the next time limit ends. An alarm that comes too early is left: its turn sets the next."""
        if at_s is not None and self._alarm is not None and self._alarm_s <= at_s:
            return
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if at_s is not None:
            timer = self._timer or asyncio.get_running_loop().call_later
            self._alarm_s = at_s
            self._alarm = timer(max(0.0, at_s - self._clock()), self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._turn()
