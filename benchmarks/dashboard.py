"""What the dashboard costs a service: a look at 500 engines and their blocks, and queries while pages are open.

A process of its own holds the index, a router with as many endpoints, and the HTTP API; it is filled with chains that lie on
50 engines each. Queries ask who holds 4,096 tokens (the best five), one after the other, in turns with and without three pages
that poll as the page does; without is the baseline. Looks are CPU time in that process, queries wall time here.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event

import httpx
import uvicorn
import uvloop

from benchmarks.result import Result, against, median, percentile
from benchmarks.sides import Placement
from benchmarks.streams import CHAIN_BLOCKS, Chain
from kvatlas.config import load_config
from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.index.protocol import PayloadIndex
from kvatlas.indexer import Indexer
from kvatlas.route.log import DecisionLog
from kvatlas.route.picker_config import build_router
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Router
from kvatlas.serve.dashboard.http import DashboardRoutes
from kvatlas.serve.dashboard.sampler import Sampler
from kvatlas.serve.http import build_app
from kvatlas.serve.routing.picker import picker_of
from kvatlas.tokens.setup import make_tokenization
from kvatlas.types import DpRank, PodId, Stream

NAME = "dashboard"
ENGINES = 500
SHARERS = 50
"""Engines that hold the same chain."""
PROMPT_TOKENS = 4096
PAGES = 3
MODEL = "m"


def run(*, quick: bool, place: Placement) -> list[Result]:
    """``place`` is not used: the service's threads and those who ask need both cores."""
    blocks = 2 * CHAIN_BLOCKS if quick else 10 * CHAIN_BLOCKS
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    watching = context.Event()
    service = context.Process(target=_serve, args=(theirs, blocks // CHAIN_BLOCKS))
    service.start()
    started: list[BaseProcess] = [service]
    try:
        url = f"http://127.0.0.1:{ours.recv()}"
        pages = context.Process(target=_pages, args=(url, watching))  # apart: what they do with answers is not the service's
        pages.start()
        started.append(pages)
        return asyncio.run(_measure(url, ours, watching, ENGINES * blocks, rounds=4 if quick else 10))
    finally:
        for process in started:
            process.kill()
            process.join()


async def _measure(url: str, service: Connection, watching: Event, entries: int, rounds: int) -> list[Result]:
    of = f"{ENGINES} engines, {entries / 1e6:.1f}M blocks held"
    asked: dict[bool, list[float]] = {False: [], True: []}
    body = {"model": MODEL, "token_ids": Chain(0).tokens[:PROMPT_TOKENS].tolist(), "limit": 5}
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for turn in range(2 * rounds):
            watched = bool(turn % 2)
            (watching.set if watched else watching.clear)()
            ends_s = time.perf_counter() + 4.0
            while time.perf_counter() < ends_s:
                began_s = time.perf_counter()
                (await http.post("/v1/candidates", json=body)).raise_for_status()
                asked[watched].append(time.perf_counter() - began_s)
            began_s = time.perf_counter()
        answer = await http.get("/v1/dashboard")
        first_ms = 1e3 * (time.perf_counter() - began_s)
    service.send(None)
    looks_ms = service.recv()
    results = [
        Result(NAME, f"{of}: one look, CPU time, best of {len(looks_ms)}", min(looks_ms), "ms", higher_is_better=False),
        Result(NAME, f"{of}: one look, CPU time, median", median(looks_ms), "ms", higher_is_better=False),
        Result(NAME, f"{of}: an answer with the whole history", len(answer.content) / 1e3, "kB", higher_is_better=False),
        Result(NAME, f"{of}: time to that answer", first_ms, "ms", higher_is_better=False),
    ]
    for share in (0.5, 0.99):
        with_pages, without = (1e3 * percentile(asked[watched], share) for watched in (True, False))
        scenario = f"{of}: who holds {PROMPT_TOKENS} tokens, {PAGES} pages open, p{100 * share:.0f}"
        results.append(against(NAME, scenario, with_pages, "ms", "no page open", without, higher_is_better=False))
    return results


def _pages(url: str, watching: Event) -> None:
    """Ask as pages do, while they are to."""

    async def page(http: httpx.AsyncClient) -> None:
        since, tag = 0, ""
        while True:
            if watching.is_set():
                answer = await http.get(f"/v1/dashboard?since={since}", headers={"if-none-match": tag} if tag else {})
                if answer.status_code == httpx.codes.OK:
                    history = answer.json()["history"]
                    since, tag = history["first"] + len(history["columns"]["requests"]), answer.headers["etag"]
            await asyncio.sleep(2.0)

    async def all_pages() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            await asyncio.gather(*(page(http) for _ in range(PAGES)))

    asyncio.run(all_pages())


def _serve(pipe: Connection, chains_each: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    config = load_config(
        environ={}, overrides=["zmq.bind=false", "index.maxSize=100000000", "index.maxBytes=16GiB", "index.ttl=24h"]
    )
    indexer = Indexer(config)
    _fill(indexer, chains_each)
    router = _router(indexer)
    sampler = Sampler(indexer, router)
    for number in range(200):
        tokens = Chain(number % 4).tokens[: PROMPT_TOKENS + 16 * number]
        router.decide(RouteRequest(id=f"r{number}", model=MODEL, token_ids=tokens))
    app = build_app(indexer, make_tokenization(config.tokens, indexer.metrics), dashboard=DashboardRoutes(sampler))

    async def serve() -> None:
        looking = asyncio.create_task(sampler.run())
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        pipe.send(listener.getsockname()[1])
        await asyncio.to_thread(pipe.recv)
        looking.cancel()
        pipe.send([_look_ms(sampler, router) for _ in range(20)])
        await serving

    uvloop.run(serve())


def _look_ms(sampler: Sampler, router: Router) -> float:
    began_s = time.thread_time()
    sampler._collect(0, router.log.last(12))
    return 1e3 * (time.thread_time() - began_s)


def _fill(indexer: Indexer, chains_each: int) -> None:
    index = indexer.index
    assert isinstance(index, PayloadIndex), "this benchmark needs the native core"
    for group in range(ENGINES // SHARERS):
        for place in range(chains_each):
            payloads = list(Chain(group * chains_each + place).stored(256))
            for engine in range(group * SHARERS, (group + 1) * SHARERS):
                index.apply_payloads(Stream(PodId(_name(engine)), DpRank(0)), payloads, model=MODEL)


def _name(engine: int) -> str:
    return f"10.0.{engine // 250}.{engine % 250}:8000"


def _router(indexer: Indexer) -> Router:
    router = build_router(picker_of(indexer.config.route), index=indexer, log=DecisionLog())
    router.set_endpoints(pool_from_urls([f"http://{_name(engine)}" for engine in range(ENGINES)]).endpoints)
    return router
