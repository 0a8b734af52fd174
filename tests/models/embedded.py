"""Embedded engines within a test's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache

import httpx
import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from kvatlas.serve.listening import bind
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.live.faults import Fault
from kvatlas.sim.live.server import EngineOptions, RunningEngine, load_tokens, running
from kvatlas.sim.live.tokens import EngineTokens

QUICK = EngineSpec(costs=EngineCosts(step_s=0.001, prefill_token_s=0.00001), gpu_blocks=256)
ROOMY = msgspec.structs.replace(QUICK, gpu_blocks=4096)


@cache
def tokens() -> EngineTokens:
    """Return the packaged tokenizer, loaded once a process."""
    return load_tokens(EngineOptions())


@asynccontextmanager
async def embedded(spec: EngineSpec = QUICK, **options: object) -> AsyncIterator[tuple[RunningEngine, httpx.AsyncClient]]:
    """Run an engine for as long as the block lasts, with a client of its API."""
    async with (
        running(spec, EngineOptions(**options), tokens()) as engine,  # type: ignore[arg-type]
        httpx.AsyncClient(base_url=engine.started.url, timeout=60, trust_env=False) as client,
    ):
        yield engine, client


class Seen(msgspec.Struct, frozen=True):
    """A request as it came."""

    path: str
    headers: Mapping[str, str]
    """By lower-case name."""
    raw_headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Watched:
    """An embedded engine and all that is asked of it but its metrics. Made by :func:`engine`."""

    def __init__(self) -> None:
        self.requests: list[Seen] = []
        self.answered = 0
        self.cancelled = 0
        """Requests whose client went away."""
        self.running: RunningEngine
        self._changed = asyncio.Condition()

    @property
    def url(self) -> str:
        return self.running.started.url

    @property
    def authority(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def host(self) -> str:
        return self.authority.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.authority.rpartition(":")[2])

    @property
    def connections(self) -> int:
        """Open ones, to whatever."""
        assert self.running.runner.server is not None
        return len(self.running.runner.server.connections)

    def fail(self, *faults: Fault) -> None:
        """Let these things go wrong, and nothing else."""
        self.running.faults.set(*faults)

    def stall(self, after: int) -> None:
        """Let streams come up to so many tokens, other answers by half."""
        self.fail(Fault("stall", after=after))

    async def refuse(self) -> None:
        """Refuse connections, and cut those there are: a process that died."""
        for site in list(self.running.runner.sites):
            await site.stop()
        assert self.running.runner.server is not None
        for connection in list(self.running.runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    async def listen(self) -> None:
        """Take connections again, on the port that it had."""
        await web.SockSite(self.running.runner, bind("engine", self.host, self.port, listen=True)).start()

    async def until(self, condition: Callable[[Watched], bool]) -> None:
        """Wait until something is true of what was asked."""
        async with self._changed:
            await self._changed.wait_for(lambda: condition(self))

    @web.middleware
    async def watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == "/metrics":
            return await handler(request)
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append(Seen(request.path, headers, tuple(request.raw_headers), await request.read()))
        await self._tell()
        try:
            answer = await handler(request)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            await self._tell()
            raise
        self.answered += 1
        await self._tell()
        return answer

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@asynccontextmanager
async def engine(spec: EngineSpec = ROOMY, **options: object) -> AsyncIterator[Watched]:
    """Run an engine for as long as the block lasts, and watch what is asked of it. ``options``: see EngineOptions."""
    one = Watched()
    async with running(spec, EngineOptions(**options), tokens(), [one.watch]) as one.running:  # type: ignore[arg-type]
        yield one
