"""Requests are admitted one by one, in order, and none is left waiting."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest

from kvatlas.errors import ExpiredError, NoEndpointError, RouteError, SaturatedError, StoppingError
from kvatlas.route.cycle import Candidate
from kvatlas.route.flow.band import BandPlan
from kvatlas.route.flow.policies import FcfsOrdering, RoundRobinFairness
from kvatlas.route.flow.saturation import ConcurrencyDetector, UtilizationDetector
from kvatlas.route.flow.waiting_room import WaitingRoom
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.picker_config import build_router, read_config
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Flight
from kvatlas.serve.admission import Admission, AdmissionEnd, admission_of
from tests.unit.route.flow.fleet import candidate, one_band, plugin


class Alarm:
    """A timer that goes off when it is told to."""

    def __init__(self, after_s: float, call: Callable[[], None]) -> None:
        self.after_s = after_s
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Pool:
    """One endpoint with so many places, an admission before it, and a clock that is set."""

    def __init__(
        self, places: int = 1, *, flow: bool = True, detector: Any = None, requests_max: int = 100, **more: Any
    ) -> None:
        self.places = places
        self.busy = 0
        self.now_s = 0.0
        self.there = True
        self.order: list[str] = []
        self.busy_max = 0
        self.ends: list[tuple[int, AdmissionEnd, float]] = []
        self.alarms: list[Alarm] = []
        band = BandPlan(requests_max, 10**6, plugin(RoundRobinFairness), plugin(FcfsOrdering))
        self.admission = Admission(
            detector or plugin(ConcurrencyDetector, maxConcurrency=places),
            self.candidates,
            lambda: self.now_s,
            room=WaitingRoom(one_band(band, **more)) if flow else None,
            observer=self,
            timer=self.timer,
        )

    def candidates(self) -> tuple[Candidate, ...]:
        return (candidate("a", requests=self.busy),) if self.there else ()

    def ended(self, priority: int, end: AdmissionEnd, waited_s: float) -> None:
        self.ends.append((priority, end, waited_s))

    def timer(self, after_s: float, call: Callable[[], None]) -> Alarm:
        self.alarms.append(Alarm(after_s, call))
        return self.alarms[-1]

    async def ask(self, name: str = "r", **more: Any) -> None:
        """Ask, and begin at once, as front doors do."""
        deadline_s = more.pop("deadline_s", math.inf)
        await self.admission.admit(RouteRequest(id=name, model="m", **more), 10, deadline_s)
        self.busy += 1
        self.busy_max = max(self.busy_max, self.busy)
        self.order.append(name)

    def finish(self) -> None:
        self.busy -= 1
        self.admission.changed()

    async def pass_to(self, now_s: float) -> None:
        """Let time pass, and the alarm that is set go off."""
        self.now_s = now_s
        live = [alarm for alarm in self.alarms if not alarm.cancelled]
        self.alarms.clear()
        for alarm in live:
            alarm.call()
        await settled()


async def settled() -> None:
    """Let every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def asking(pool: Pool, *names: str, **more: Any) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(pool.ask(name, **more)) for name in names]


async def refusal(task: asyncio.Task[None]) -> RouteError:
    with pytest.raises(RouteError) as caught:
        await task
    return caught.value


async def test_a_pool_with_room_admits_without_waiting() -> None:
    pool = Pool(places=2)
    asked = pool.ask("a")
    with pytest.raises(StopIteration):  # the coroutine ends without ever giving the loop a turn
        asked.send(None)
    assert pool.order == ["a"]
    assert pool.alarms == []


async def test_a_place_that_gets_free_admits_one() -> None:
    pool = Pool(places=1)
    tasks = asking(pool, "a", "b", "c", "d")
    await settled()
    assert pool.order == ["a"]
    for names in (["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]):
        pool.finish()
        await settled()
        assert pool.order == names
    assert pool.busy_max == 1
    await asyncio.gather(*tasks)


async def test_all_places_that_get_free_are_used() -> None:
    pool = Pool(places=3)
    tasks = asking(pool, *"abcdefgh")
    await settled()
    assert pool.order == ["a", "b", "c"]
    pool.busy = 0
    pool.admission.changed()
    await asyncio.gather(*tasks[:6])
    assert pool.order == list("abcdef")
    assert pool.busy_max == 3
    pool.busy = 0
    pool.admission.changed()
    await asyncio.gather(*tasks)
    assert pool.busy_max == 3


async def test_reports_admit_no_more_than_the_engines_have_room_for() -> None:
    pool = Pool(detector=plugin(UtilizationDetector, queueDepthThreshold=4))
    state = {"at_s": 0.0, "waiting": 4}
    pool.admission._candidates = lambda: (candidate("a", requests=pool.busy, **state),)
    tasks = asking(pool, *"abcdefgh")
    await settled()
    assert pool.order == []
    pool.now_s = 0.1
    state.update(at_s=0.1, waiting=1)
    pool.admission.changed()
    await settled()
    assert pool.order == ["a", "b", "c"]
    pool.admission.changed()
    await settled()
    assert pool.order == ["a", "b", "c"], "the engine has not said what became of them"
    pool.now_s = 0.2
    state.update(at_s=0.2, waiting=3)
    pool.admission.changed()
    await settled()
    assert pool.order == ["a", "b", "c", "d"]
    pool.admission.close()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_higher_priorities_go_before_lower_ones_that_came_earlier() -> None:
    pool = Pool(places=1)
    (first,) = asking(pool, "first")
    await settled()
    tasks = asking(pool, "low", priority=-1) + asking(pool, "usual") + asking(pool, "high", priority=5)
    for _ in tasks:
        await settled()
        pool.finish()
    await asyncio.gather(first, *tasks)
    assert pool.order == ["first", "high", "usual", "low"]


async def test_tenants_take_turns() -> None:
    pool = Pool(places=1)
    (first,) = asking(pool, "first")
    await settled()
    tasks = asking(pool, "l1", "l2", "l3", fairness_id="loud") + asking(pool, "q1", fairness_id="quiet")
    for _ in tasks:
        await settled()
        pool.finish()
    await asyncio.gather(first, *tasks)
    assert pool.order == ["first", "l1", "q1", "l2", "l3"]


async def test_a_full_band_answers_429() -> None:
    pool = Pool(places=1, requests_max=1)
    tasks = asking(pool, "a", "b", "c")
    error = await refusal(tasks[2])
    assert isinstance(error, SaturatedError)
    assert (error.status, error.reason) == (429, "rejected-saturated")
    pool.finish()
    await asyncio.gather(*tasks[:2])


async def test_a_displaced_request_is_told_so() -> None:
    pool = Pool(places=1, requests_max=2)
    tasks = asking(pool, "a", "l1", "l2", fairness_id="loud") + asking(pool, "q", fairness_id="quiet")
    error = await refusal(tasks[2])
    assert isinstance(error, SaturatedError)
    assert "needed for others" in str(error)
    pool.finish()
    await settled()
    pool.finish()
    await asyncio.gather(tasks[0], tasks[1], tasks[3])


async def test_a_request_that_waited_long_enough_gets_429() -> None:
    pool = Pool(places=1)
    tasks = asking(pool, "a", "b")
    await settled()
    assert [alarm.after_s for alarm in pool.alarms] == [60.0]
    await pool.pass_to(59.0)
    assert not tasks[1].done()
    await pool.pass_to(60.0)
    error = await refusal(tasks[1])
    assert isinstance(error, ExpiredError)
    assert (error.status, error.reason) == (429, "rejected-ttl-expired")
    assert pool.ends[-1] == (0, AdmissionEnd.EXPIRED, 60.0)


async def test_an_earlier_deadline_brings_the_alarm_forward() -> None:
    pool = Pool(places=1)
    tasks = asking(pool, "a", "b") + asking(pool, "c", deadline_s=5.0)
    await settled()
    await pool.pass_to(5.0)
    assert isinstance(await refusal(tasks[2]), ExpiredError)
    assert not tasks[1].done()
    await pool.pass_to(60.0)
    assert isinstance(await refusal(tasks[1]), ExpiredError)


async def test_requests_wait_for_an_endpoint_to_come() -> None:
    pool = Pool(places=5, no_endpoint_ttl_s=600.0)
    pool.there = False
    tasks = asking(pool, "a", "b")
    await settled()
    assert pool.order == []
    await pool.pass_to(300.0)
    pool.there = True
    pool.admission.changed()
    await asyncio.gather(*tasks)
    assert pool.order == ["a", "b"]


async def test_where_no_endpoint_comes_requests_get_503() -> None:
    pool = Pool(places=5, requests_max=1, no_endpoint_ttl_s=30.0)
    pool.there = False
    tasks = asking(pool, "a", "b")
    full = await refusal(tasks[1])
    await pool.pass_to(30.0)
    for error in (full, await refusal(tasks[0])):
        assert isinstance(error, NoEndpointError)
        assert (error.status, error.reason) == (503, "rejected-no-endpoints")


async def test_where_nobody_decodes_requests_get_503_however_busy_prefill_is() -> None:
    pool = Pool(places=1, no_endpoint_ttl_s=30.0)
    pool.admission._candidates = lambda: (candidate("p", requests=9, role="prefill"),)
    (task,) = asking(pool, "a")
    await settled()
    await pool.pass_to(30.0)
    assert isinstance(await refusal(task), NoEndpointError)


async def test_a_client_that_is_gone_leaves_its_place_to_others() -> None:
    pool = Pool(places=1)
    tasks = asking(pool, "a", "b", "c")
    await settled()
    tasks[1].cancel()
    await settled()
    assert pool.ends[-1][1] is AdmissionEnd.CANCELLED
    pool.finish()
    await asyncio.gather(tasks[0], tasks[2])
    assert pool.order == ["a", "c"]


@pytest.mark.parametrize("turns", range(4))
async def test_a_client_that_goes_as_its_turn_comes_does_not_stop_the_queue(turns: int) -> None:
    pool = Pool(places=1)
    tasks = asking(pool, "a", "b", "c")
    await settled()
    pool.finish()
    for _ in range(turns):
        await asyncio.sleep(0)
    tasks[1].cancel()
    await settled()
    if "b" in pool.order:
        pool.finish()
    await asyncio.wait_for(tasks[2], 30)
    assert pool.busy_max == 1
    assert pool.admission.stats().bands[0].requests == 0


async def test_a_refusal_that_nobody_waits_for_any_more_is_no_unhandled_error() -> None:
    unhandled: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    pool = Pool(places=1)
    tasks = asking(pool, "a", "b")
    await settled()
    pool.admission.close()
    tasks[1].cancel()
    await asyncio.wait(tasks)
    assert tasks[1].cancelled()
    del tasks
    gc.collect()
    assert unhandled == []


async def test_closing_refuses_what_waits_and_what_comes() -> None:
    pool = Pool(places=1)
    tasks = asking(pool, "a", "b", "c")
    await settled()
    pool.admission.close()
    for task in (*tasks[1:], *asking(pool, "d")):
        error = await refusal(task)
        assert isinstance(error, StoppingError)
        assert (error.status, error.reason) == (503, "rejected-shutting-down")
    assert all(alarm.cancelled for alarm in pool.alarms)
    pool.finish()
    await settled()


async def test_without_flow_control_only_what_may_be_shed_is() -> None:
    pool = Pool(places=1, flow=False)
    await pool.ask("a", priority=-1)
    await pool.ask("b")
    error = await refusal(*asking(pool, "c", priority=-1))
    assert (error.status, error.reason) == (429, "rejected-saturated")
    await pool.ask("d", priority=0)
    assert pool.order == ["a", "b", "d"]


async def test_without_flow_control_an_empty_pool_is_not_a_busy_one() -> None:
    pool = Pool(flow=False)
    pool.there = False
    await pool.ask("a", priority=-1)  # deciding says that nobody is there: 503


async def test_without_flow_control_a_gateways_subset_counts() -> None:
    pool = Pool(places=1, flow=False)
    pool.busy = 1
    await pool.ask("a", priority=-1, subset=frozenset({"10.9.9.9"}))
    assert isinstance(await refusal(*asking(pool, "b", priority=-1, subset=frozenset({"10.0.0.1"}))), SaturatedError)


async def test_every_request_is_counted_once() -> None:
    pool = Pool(places=1, requests_max=2)
    tasks = asking(pool, "admitted", "expired", "cancelled", "full")
    await settled()
    stats = pool.admission.stats()
    assert [(band.priority, band.requests, band.bytes) for band in stats.bands] == [(0, 2, 20)]
    assert stats.saturation == 1.0
    tasks[2].cancel()
    await pool.pass_to(60.0)
    tasks += asking(pool, "stopped")
    await settled()
    pool.admission.close()
    await asyncio.gather(*tasks, return_exceptions=True)
    ends = (AdmissionEnd.ADMITTED, AdmissionEnd.FULL, AdmissionEnd.CANCELLED, AdmissionEnd.EXPIRED, AdmissionEnd.STOPPED)
    assert pool.admission.stats().ends == dict.fromkeys(ends, 1)
    assert sorted(end.value for _, end, _ in pool.ends) == sorted(end.value for end in ends)


async def test_the_loops_own_clock_ends_waits_too() -> None:
    loop = asyncio.get_running_loop()
    pool = Pool(ttl_s=0.01)
    pool.admission._clock = loop.time
    pool.admission._timer = None
    pool.busy = 1
    with pytest.raises(ExpiredError):
        await pool.ask("a")


POOL_OF_ONE = """
featureGates: [flowControl]
plugins:
- {type: concurrency-detector, parameters: {maxConcurrency: 1}}
- {type: round-robin-fairness-policy}
- {type: random-picker}
flowControl:
  saturationDetector: {pluginRef: concurrency-detector}
  maxRequests: 2
  defaultPriorityBand: {fairnessPolicyRef: round-robin-fairness-policy}
schedulingProfiles: [{name: default, plugins: [{pluginRef: random-picker}]}]
"""


async def test_a_picker_configuration_makes_an_admission_in_front_of_its_router() -> None:
    config = read_config(POOL_OF_ONE)
    router = build_router(config)
    router.set_endpoints([candidate("a").endpoint])
    admission = admission_of(router, config.flow_control, flow_control=config.flow_control_on)

    async def send(name: str) -> Flight:
        request = RouteRequest(id=name, model="m")
        await admission.admit(request, 1)
        return router.decide(request)

    first, *others = [asyncio.create_task(send(name)) for name in "abcd"]
    flight = await first
    assert isinstance(await refusal(others[2]), SaturatedError)
    for task in others[:2]:
        assert not task.done()
        flight.finished(Outcome(end=End.DONE))
        admission.changed()
        flight = await task
    flight.finished(Outcome(end=End.DONE))
    assert admission.stats().ends == {AdmissionEnd.ADMITTED: 3, AdmissionEnd.FULL: 1}
