"""Engines' metrics are polled over HTTP: from servers on loopback, well and badly behaved."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.discovery.health import Health, HealthLimits, HealthState
from kvatlas.discovery.pace import PollLimits
from kvatlas.discovery.poller import Poller
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.load import EngineReport
from tests.integration.engines import Engine, engine, until, vllm_page

FAST = PollLimits(interval_s=0.01, timeout_s=5.0, backoff_max_s=0.05)
IMPATIENT = PollLimits(interval_s=0.01, timeout_s=0.1, backoff_max_s=0.05)


class Polling:
    """What a poller told."""

    def __init__(self, limits: PollLimits) -> None:
        self.reports: dict[EndpointName, EngineReport] = {}
        self.told = 0
        self.outcomes: Counter[str] = Counter()
        self.health = Health(HealthLimits(polls_failed_max=3))
        self.poller = Poller(
            self._report, health=self.health, observe=lambda one, _: self.outcomes.update([one.value]), limits=limits
        )

    def poll(self, *urls: str) -> None:
        endpoints = pool_from_urls(urls).endpoints
        self.health.pool_changed(endpoints)
        self.poller.set_endpoints(endpoints)

    def _report(self, name: EndpointName, report: EngineReport) -> None:
        self.told += 1
        self.reports[name] = report


@asynccontextmanager
async def polling(*urls: str, limits: PollLimits = FAST) -> AsyncIterator[Polling]:
    told = Polling(limits)
    told.poll(*urls)
    task = asyncio.create_task(told.poller.run())
    try:
        yield told
        assert not task.done(), "polling goes on"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def name_of(one: Engine) -> EndpointName:
    return EndpointName(f"default/127.0.0.1:{one.port}")


async def test_what_engines_say_is_reported_again_and_again_over_one_connection() -> None:
    async with (
        engine(vllm_page(waiting=3, running=2, usage=0.5)) as one,
        engine() as other,
        polling(one.url, other.url) as told,
    ):
        await until(lambda: len(told.reports) == 2)
        assert (told.reports[name_of(one)].waiting, told.reports[name_of(other)].waiting) == (3, 0)
        one.page = vllm_page(waiting=9)
        await until(lambda: told.reports[name_of(one)].waiting == 9)
        await until(lambda: one.polls > 10)
        assert len(one.connections) == 1
        assert one.in_progress_max == 1
        state = told.poller.states()[name_of(one)]
        assert (state.failures, state.problem) == (0, None)
        assert state.reported_at_s is not None


async def test_ranks_behind_an_address_share_a_poll_and_have_reports_of_their_own() -> None:
    async with engine(vllm_page(waiting=5, ranks=2)) as one, polling(f"{one.url}?dpRanks=2") as told:
        await until(lambda: len(told.reports) == 2)
        first, second = f"{name_of(one)}#dp0", f"{name_of(one)}#dp1"
        assert (told.reports[EndpointName(first)].waiting, told.reports[EndpointName(second)].waiting) == (5, 6)
        assert one.in_progress_max == 1


async def test_an_engine_that_goes_is_unreachable_until_it_is_back() -> None:
    async with polling() as told:
        async with engine() as one:
            told.poll(one.url)
            await until(lambda: name_of(one) in told.reports)
        await until(lambda: not told.health.healthy(name_of(one)))
        assert told.health.state(name_of(one)) is HealthState.UNREACHABLE
        assert "Connect" in (told.poller.states()[name_of(one)].problem or "")
        seen = told.told
        async with engine(port=one.port):
            await until(lambda: told.told > seen)
            assert told.health.healthy(name_of(one))


async def _hang(_one: Engine) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def _refuse(_one: Engine) -> web.StreamResponse:
    return web.Response(status=404)


async def _redirect(_one: Engine) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": "/metrics"})


async def _too_long(_one: Engine) -> web.StreamResponse:
    return web.Response(body=b"#" * (5 << 20))


async def _nonsense(_one: Engine) -> web.StreamResponse:
    return web.Response(body=b"\x00\xff<html>")


@pytest.mark.parametrize(
    ("answer", "outcome", "problem"),
    [
        (_refuse, "refused", "status 404"),
        (_redirect, "refused", "status 302"),
        (_too_long, "garbage", "more than 4194304 bytes"),
        (_nonsense, "garbage", "no vllm:num_requests_waiting"),
    ],
)
async def test_an_answer_that_makes_no_report_is_counted_and_the_last_report_stays(answer, outcome, problem) -> None:  # type: ignore[no-untyped-def]
    async with engine(vllm_page(waiting=3)) as one, polling(one.url) as told:
        await until(lambda: bool(told.reports))
        one.answer = answer
        await until(lambda: told.outcomes[outcome] >= 4)
        assert told.reports[name_of(one)].waiting == 3
        assert problem in (told.poller.states()[name_of(one)].problem or "")
        assert told.health.healthy(name_of(one)), "somebody is there"
        one.answer = None
        await until(lambda: told.poller.states()[name_of(one)].failures == 0)


async def test_an_engine_that_hangs_delays_nobody_else() -> None:
    async with engine() as slow, engine() as quick, polling(slow.url, quick.url, limits=IMPATIENT) as told:
        slow.answer = _hang
        await until(lambda: told.outcomes["late"] >= 3)
        seen = quick.polls
        await until(lambda: quick.polls > seen + 3)
        assert told.poller.states()[name_of(slow)].problem == "does not answer in time"
        assert told.health.healthy(name_of(slow)), "late is not gone"


async def test_who_speaks_no_http_makes_no_report() -> None:
    async def shout(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(shout, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with polling(f"http://127.0.0.1:{port}") as told:
            await until(lambda: told.outcomes["garbage"] >= 2)


async def test_an_endpoint_that_leaves_the_pool_is_not_asked_again() -> None:
    async with engine() as one, engine() as other, polling(one.url, other.url) as told:
        await until(lambda: len(told.reports) == 2)
        told.poll(other.url)
        await until(lambda: one.in_progress == 0)
        asked, seen = one.polls, other.polls
        await until(lambda: other.polls > seen + 5)
        assert one.polls <= asked + 1, "one that was on its way"
        assert list(told.poller.states()) == [name_of(other)]


async def test_requests_in_progress_are_bounded() -> None:
    released = asyncio.Event()
    in_progress: Counter[str] = Counter()

    async def wait(_one: Engine) -> web.StreamResponse:
        in_progress["now"] += 1
        in_progress["most"] = max(in_progress["most"], in_progress["now"])
        await released.wait()
        in_progress["now"] -= 1
        return web.Response(body=vllm_page())

    async with engine() as one, engine() as two, engine() as three:
        for each in (one, two, three):
            each.answer = wait
        limits = PollLimits(interval_s=0.01, timeout_s=20.0, at_once_max=2)
        async with polling(one.url, two.url, three.url, limits=limits) as told:
            await until(lambda: in_progress["now"] == 2)
            released.set()
            await until(lambda: len(told.reports) == 3)
            assert in_progress["most"] == 2
