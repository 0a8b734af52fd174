"""Routers that share engines tell each other what they do, over real sockets."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest

from kvatlas.config import load_config
from kvatlas.errors import ConfigError
from kvatlas.serve.service import Addresses, serve
from kvatlas.sim.live.faults import Fault
from tests.integration.running import FREE, running
from tests.models.embedded import Watched, engine
from tests.models.ports import free_port

TOKEN = "route.peersToken=sixteen-letters-or-more"  # noqa: S105
PROMPT = "You are a booking agent that knows every airline, and answers in one sentence. " * 30


@pytest.fixture
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as made:
        yield made


def door(engines: list[Watched]) -> list[str]:
    named = ", ".join(f'"{one.url}"' for one in engines)
    return ["proxy.port=0", 'route.frontDoors=["proxy"]', f"route.endpoints=[{named}]", "zmq.bind=false"]


@asynccontextmanager
async def two_routers(
    directory: str, first: str = "", second: str = ""
) -> AsyncIterator[tuple[list[Addresses], list[Watched]]]:
    """Run two engines and two routers, each other's peers. ``first``, ``second``: a further setting of each."""
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(engine()) for _ in range(2)]
        routers = []
        for number, more in enumerate((first, second)):
            peers = [f'route.peersListen=["ipc://{directory}/{number}"]', f'route.peers=["ipc://{directory}/{1 - number}"]']
            routers.append(await stack.enter_async_context(running(*door(engines), *peers, *filter(None, [more]))))
        yield routers, engines


async def complete(router: Addresses) -> httpx.Response:
    assert router.proxy is not None
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
    async with httpx.AsyncClient(base_url=router.proxy, timeout=30) as http:
        return await http.post("/v1/completions", json=body, headers={"x-kvatlas-explain": "1"})


async def in_flight(router: Addresses) -> int:
    async with httpx.AsyncClient(base_url=router.http, timeout=30) as http:
        endpoints = (await http.get("/v1/endpoints")).json()["endpoints"]
    return sum(one["load"]["in_flight_requests"] for one in endpoints)


async def metric(router: Addresses, name: str) -> float:
    async with httpx.AsyncClient(base_url=router.http, timeout=30) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


async def until(router: Addresses, what: Callable[[int], bool]) -> None:
    while not what(await in_flight(router)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def acquainted(*routers: Addresses) -> None:
    for router in routers:
        while await metric(router, "kvatlas_route_peers ") < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_what_one_router_sent_is_in_flight_and_history_for_the_other(directory: str) -> None:
    async with two_routers(directory) as (routers, engines):
        one, other = routers
        await acquainted(*routers)
        for each in engines:
            each.fail(Fault("hang"))
        asking = asyncio.create_task(complete(one))
        await until(other, lambda requests: requests == 1)
        for each in engines:
            each.fail()
        first = await asking
        await until(other, lambda requests: requests == 0)
        again = await complete(other)
        assert (first.status_code, again.status_code) == (200, 200)
        assert again.headers["x-kvatlas-matched-by"] == "history"
        assert again.headers["x-kvatlas-endpoint"] == first.headers["x-kvatlas-endpoint"]
        assert await metric(one, 'kvatlas_route_peer_messages_total{outcome="refused') == 0


async def test_routers_with_the_same_token_understand_each_other(directory: str) -> None:
    async with two_routers(directory, TOKEN, TOKEN) as (routers, _):
        await acquainted(*routers)


async def test_routers_without_the_token_are_not_heard(directory: str) -> None:
    async with two_routers(directory, TOKEN) as (routers, _):
        for router in routers:
            while await metric(router, 'kvatlas_route_peer_messages_total{outcome="sent"}') < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert [await metric(router, "kvatlas_route_peers ") for router in routers] == [0, 0]


async def test_all_addresses_behind_a_name_are_peers(directory: str) -> None:
    async with engine() as one:
        listening = 'route.peersListen=["tcp://127.0.0.1:{port}"]'
        ports = [free_port(), free_port()]
        peers = [f'route.peers=["tcp://localhost:{ports[1]}"]', f'route.peers=["tcp://localhost:{ports[0]}"]']
        async with (
            running(*door([one]), listening.format(port=ports[0]), peers[0]) as a,
            running(*door([one]), listening.format(port=ports[1]), peers[1]) as b,
        ):
            await acquainted(a, b)
            assert (await complete(a)).status_code == 200


async def test_an_address_that_is_taken_is_refused(directory: str) -> None:
    async with engine() as one:
        overrides = (*FREE, *door([one]), f'route.peersListen=["ipc://{directory}/no/such/folder"]')
        with pytest.raises(ConfigError, match=r"route\.peersListen"):
            await serve(load_config(environ={}, overrides=overrides), stop=asyncio.Event())
