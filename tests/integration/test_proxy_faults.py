"""The proxy before engines that fail, and for clients that go away: what is tried again, what is told, what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import aiohttp
import msgspec
import pytest

from kvatlas.config import Seconds
from kvatlas.discovery.health import HealthLimits, HealthState
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.outcome import End
from kvatlas.serve.proxy.python import BROKEN_OFF
from kvatlas.serve.proxy.retries import BURST_MAX
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.live.faults import Fault
from tests.integration.proxying import CHAT, COMPLETION, Proxy, endpoint_of, proxy
from tests.models.embedded import QUICK, Watched, engine
from tests.models.odd_server import FLOOD_BYTES, byte_by_byte, flood, garbage, odd_server

pytestmark = pytest.mark.usefixtures("each_stack")

STREAM = {**COMPLETION, "stream": True, "max_tokens": 8}
E0 = EndpointName("e0")


async def ask(px: Proxy, body: dict[str, object] = COMPLETION) -> int:
    async with px.client.post("/v1/completions", json=body) as answer:
        await answer.read()
        return answer.status


async def ends(px: Proxy) -> list[tuple[str, End]]:
    """Return who had each request and how it ended, once one has; a client may have its answer before."""
    await px.until_finished(1)
    return [(where, outcome.end) for where, outcome in px.outcomes]


# -- before an answer begins --------------------------------------------------------------------------------------------


async def test_a_request_to_an_engine_that_is_gone_goes_to_the_next() -> None:
    async with engine() as one, engine() as two, proxy(one, two) as px:
        await one.refuse()
        assert await ask(px) == 200
        assert len(two.requests) == 1
        assert await ends(px) == [("e1", End.DONE)]
        assert px.router.load(E0).in_flight.requests == 0


async def test_a_request_whose_engine_breaks_off_before_its_answer_goes_to_the_next() -> None:
    async with engine() as one, engine() as two, proxy(one, two) as px:
        one.fail(Fault("reset"))
        assert await ask(px) == 200
        assert await ends(px) == [("e1", End.DONE)]
        assert one.requests[0].body == two.requests[0].body


async def test_a_request_that_is_answered_with_no_http_goes_to_the_next() -> None:
    async with odd_server(garbage) as one, engine() as two, proxy(one, two) as px:
        assert await ask(px) == 200
        assert await ends(px) == [("e1", End.DONE)]
        assert one.bodies[0] == two.requests[0].body


async def test_a_request_that_an_engine_is_too_busy_for_goes_to_the_next() -> None:
    async with engine() as one, engine() as two, proxy(one, two) as px:
        one.fail(Fault("status", status=503))
        assert [await ask(px) for _ in range(6)] == [200] * 6
        await px.until_finished(6)
        assert px.health.state(E0) is HealthState.HEALTHY  # busy is not broken


async def test_where_everybody_is_too_busy_the_engine_s_own_answer_is_passed_on() -> None:
    async with engine() as one, engine() as two, proxy(one, two) as px:
        for each in (one, two):
            each.fail(Fault("status", status=503))
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            assert answer.status == 503
            assert "status 503 is set" in await answer.text()
        assert await ends(px) == [("e1", End.ENGINE_ERROR)]


async def test_an_engine_s_other_errors_are_passed_on_at_once() -> None:
    async with engine() as one, engine() as two, proxy(one, two) as px:
        one.fail(Fault("status", status=500))
        assert await ask(px) == 500
        assert not two.requests
        assert await ends(px) == [("e0", End.ENGINE_ERROR)]


async def test_an_engine_that_says_nothing_is_given_up_and_not_tried_elsewhere() -> None:
    async with engine() as one, engine() as two, proxy(one, two, settings={"first_byte_timeout": Seconds(0.1)}) as px:
        one.fail(Fault("hang"))
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            assert answer.status == 504
            assert "proxy.firstByteTimeout" in (await answer.json())["error"]["message"]
        assert not two.requests
        assert await ends(px) == [("e0", End.UNREACHABLE)]
        await one.until(lambda e: e.cancelled == 1)


async def test_without_anybody_left_the_failure_is_told() -> None:
    async with engine() as one, proxy(one) as px:
        await one.refuse()
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            assert answer.status == 502
            assert "e0" in (await answer.json())["error"]["message"]
        assert await ends(px) == [("e0", End.UNREACHABLE)]


async def test_retries_of_one_request_are_bounded() -> None:
    async with engine() as one, engine() as two, engine() as three, engine() as four:
        engines = (one, two, three, four)
        for each in engines:
            each.fail(Fault("reset"))
        async with proxy(*engines, settings={"retries_max": 2}) as px:
            assert await ask(px) == 502
        assert [len(each.requests) for each in engines] == [1, 1, 1, 0]


async def test_retries_of_all_requests_are_a_share_of_them() -> None:
    async with engine() as one, engine() as two:
        for each in (one, two):
            each.fail(Fault("status", status=503))
        async with proxy(one, two, settings={"retry_share": 0.0}) as px:
            for _ in range(40):
                assert await ask(px) == 503
        assert len(one.requests) == 40
        assert len(two.requests) == BURST_MAX


async def test_all_ranks_at_an_address_that_is_gone_are_passed_over() -> None:
    async with engine() as one, engine() as two, proxy() as px:
        ranks = [endpoint_of(one, f"e0#dp{rank}", names_rank=True, dp_rank=rank) for rank in range(4)]
        px.route_to(*ranks, endpoint_of(two, "e1"))
        await one.refuse()
        assert await ask(px) == 200
        assert len(px.router.log.last(1)[0].moves) == 1


async def test_a_kept_connection_that_the_engine_closed_is_no_failure() -> None:
    async with engine() as one, proxy(one, settings={"retries_max": 0}) as px:
        for _ in range(20):
            assert await ask(px) == 200
            one.fail(Fault("reset", times=1))
            assert await ask(px) == 200  # the connection was used before: another one is made
        await px.until_finished(40)
        assert px.health.state(E0) is HealthState.HEALTHY


# -- circuit breakers ---------------------------------------------------------------------------------------------------


async def test_an_engine_that_fails_is_left_alone_then_tried_again() -> None:
    now = 0.0
    async with engine() as one, engine() as two, proxy(one, two, limits=HealthLimits(3, 5.0), clock=lambda: now) as px:
        await one.refuse()
        for _ in range(5):
            assert await ask(px) == 200
        await px.until_finished(5)
        assert px.health.state(E0) is HealthState.FAILING
        await one.listen()
        assert await ask(px) == 200
        assert not one.requests
        now = 6.0
        assert await ask(px) == 200
        assert len(one.requests) == 1
        await px.until_finished(7)
        assert px.health.state(E0) is HealthState.HEALTHY


async def test_engines_that_come_and_go_cost_no_request() -> None:
    async with engine() as one, engine() as two, proxy(one, two, settings={"retry_share": 1.0}) as px:
        for turn in range(10):
            await one.refuse()
            assert await ask(px) == 200
            await one.listen()
            assert await ask(px, STREAM if turn % 2 else COMPLETION) == 200


async def test_where_nobody_is_healthy_requests_are_sent_nevertheless() -> None:
    async with engine() as one, proxy(one, limits=HealthLimits(1, 1e9)) as px:
        one.fail(Fault("status", status=500, times=1))
        assert await ask(px) == 500
        await px.until_finished(1)
        assert px.health.state(E0) is HealthState.FAILING
        assert await ask(px) == 200


# -- midway -------------------------------------------------------------------------------------------------------------


async def test_an_answer_that_the_engine_breaks_off_is_broken_off_with_a_reason() -> None:
    async with engine() as one, engine() as two, proxy(one, two) as px:
        one.fail(Fault("cut", after=2))
        async with px.client.post("/v1/completions", json=STREAM) as answer:
            assert answer.status == 200
            received = b""
            with contextlib.suppress(aiohttp.ClientPayloadError):
                while piece := await answer.content.readany():
                    received += piece
                pytest.fail("the answer ended as if it were whole")
        assert received.endswith(BROKEN_OFF)
        data, _, _ = received.partition(BROKEN_OFF)
        told = [json.loads(event[6:])["choices"][0]["text"] for event in data.split(b"\n\n") if event]
        assert len("".join(told).split()) == 2
        assert await ends(px) == [("e0", End.ENGINE_ERROR)]
        assert not two.requests


async def test_an_answer_that_is_no_stream_is_broken_off_without_a_word() -> None:
    async with engine() as one, proxy(one) as px:
        one.fail(Fault("cut", after=2))
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        assert await ends(px) == [("e0", End.ENGINE_ERROR)]


async def test_an_engine_that_stops_midway_is_given_up() -> None:
    async with engine() as one, proxy(one, settings={"idle_timeout": Seconds(0.1)}) as px:
        one.fail(Fault("stall", after=2))
        async with px.client.post("/v1/completions", json=STREAM) as answer:
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        assert await ends(px) == [("e0", End.ENGINE_ERROR)]
        await one.until(lambda e: e.cancelled == 1)


async def test_a_request_ends_when_its_time_is_over_however_it_goes_on() -> None:
    slow = msgspec.structs.replace(QUICK, costs=EngineCosts(step_s=0.01, prefill_token_s=0))
    async with engine(slow) as one, proxy(one, settings={"request_timeout": Seconds(0.2)}) as px:
        async with px.client.post("/v1/completions", json={**STREAM, "max_tokens": 1000}) as answer:
            with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionResetError)):
                await answer.read()
        assert await ends(px) == [("e0", End.ENGINE_ERROR)]


async def test_a_slow_answer_passes_byte_by_byte() -> None:
    async with odd_server(byte_by_byte) as one, proxy(one) as px:
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            assert json.loads(await answer.read())["choices"]
        assert await ends(px) == [("e0", End.DONE)]


# -- clients ------------------------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_before_the_answer_ends_the_engine_s_work() -> None:
    async with engine() as one, proxy(one) as px:
        one.fail(Fault("hang"))
        task = asyncio.create_task(ask(px))
        await one.until(lambda e: len(e.requests) == 1)
        task.cancel()
        await one.until(lambda e: e.cancelled == 1)
        await px.until_finished(1)
        assert await ends(px) == [("e0", End.CLIENT_GONE)]
        assert px.server.in_progress == 0
        assert px.router.load(E0).in_flight.requests == 0
        assert px.health.state(E0) is HealthState.HEALTHY


async def test_clients_that_leave_at_any_moment_leave_nothing_behind() -> None:
    body = json.dumps(STREAM).encode()
    sent = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with engine() as one, proxy(one, settings={"shutdown_grace": Seconds(60)}) as px:
        for length in range(len(sent) - len(body), len(sent) + 1):
            _, writer = await asyncio.open_connection(*px.address)
            writer.write(sent[:length])
            await writer.drain()
            writer.transport.abort()
        for _ in range(50):  # here and gone before the event loop hears of either
            with socket.create_connection(px.address) as client:
                client.sendall(sent)
        assert await ask(px) == 200
        await asyncio.wait_for(px.server.stop(), 20)  # nobody is waited for
        assert px.server.in_progress == 0
        assert px.router.load(E0).in_flight.requests == 0


async def test_a_client_that_leaves_midway_ends_the_engine_s_work() -> None:
    async with engine() as one, proxy(one) as px:
        one.stall(after=1)
        async with px.client.post("/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 100}) as answer:
            await answer.content.readuntil(b"\n\n")
            answer.close()
        await one.until(lambda e: e.cancelled == 1)
        await px.until_finished(1)
        assert await ends(px) == [("e0", End.CLIENT_GONE)]


async def test_what_a_slow_client_does_not_take_stays_with_the_engine() -> None:
    async with (
        odd_server(flood) as one,
        proxy(one) as px,
        px.client.post("/v1/completions", json=STREAM) as answer,
    ):
        await answer.content.readany()
        sent = -1
        while sent != one.bytes_sent:  # until all buffers on the way are full
            sent = one.bytes_sent
            for _ in range(2_000):
                await asyncio.sleep(0)
        assert sent < 30 << 20
        rest = await answer.content.read()
        assert rest.endswith(b"data: [DONE]\n\n")


async def test_a_client_that_takes_nothing_is_given_up() -> None:
    async with (
        odd_server(flood) as one,
        proxy(one, settings={"client_timeout": Seconds(0.3)}) as px,
        px.client.post("/v1/completions", json=STREAM) as answer,
    ):
        await px.until_finished(1)
        assert await ends(px) == [("e0", End.CLIENT_GONE)]
        await one.ended.wait()
        assert one.bytes_sent < FLOOD_BYTES
        answer.close()


async def test_engines_have_as_many_connections_as_they_may() -> None:
    async with engine() as one, engine() as two, proxy(one, two, settings={"engine_connections_max": 2}) as px:
        one.fail(Fault("hang", times=2))
        waiting = [asyncio.create_task(ask(px)) for _ in range(2)]
        await one.until(lambda e: len(e.requests) == 2)
        assert await ask(px) == 200
        assert len(two.requests) == 1
        for task in waiting:
            task.cancel()


async def test_a_hundred_clients_are_served_while_engines_die_and_return() -> None:
    async with engine() as one, engine() as two, engine() as three:
        engines: tuple[Watched, ...] = (one, two, three)
        async with proxy(*engines, settings={"retry_share": 1.0, "retries_max": 2}) as px:
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(ask(px, STREAM)) for _ in range(100)]
                await one.until(lambda e: e.answered > 5)
                one.fail(Fault("reset", times=20))
            assert {task.result() for task in asked} <= {200, 502}
            await px.until_finished(100)
            assert px.server.in_progress == 0
            assert all(px.router.load(endpoint.name).in_flight.requests == 0 for endpoint in px.router.endpoints)
