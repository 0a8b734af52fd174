"""HTTP servers on loopback that show metrics as engines do, and can be slow, wrong or gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

Answer = Callable[["Engine"], Awaitable[web.StreamResponse]]


def vllm_page(waiting: int = 0, running: int = 0, usage: float = 0.0, ranks: int = 1) -> bytes:
    """Return what matters of a vLLM's metrics page."""
    return b"".join(
        b'vllm:num_requests_waiting{engine="%d",model_name="m"} %d.0\n'
        b'vllm:num_requests_running{engine="%d",model_name="m"} %d.0\n'
        b'vllm:kv_cache_usage_perc{engine="%d",model_name="m"} %f\n' % (rank, waiting + rank, rank, running, rank, usage)
        for rank in range(ranks)
    )


class Engine:
    """A server's state: what it answers, and what was asked of it."""

    def __init__(self, page: bytes) -> None:
        self.page = page
        self.answer: Answer | None = None
        """Instead of the page."""
        self.polls = 0
        self.in_progress = 0
        self.in_progress_max = 0
        self.connections: set[object] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        self.polls += 1
        self.connections.add(request.transport)
        self.in_progress += 1
        self.in_progress_max = max(self.in_progress_max, self.in_progress)
        try:
            if self.answer is not None:
                return await self.answer(self)
            return web.Response(body=self.page, content_type="text/plain")
        finally:
            self.in_progress -= 1


@asynccontextmanager
async def engine(page: bytes = vllm_page(), port: int = 0) -> AsyncIterator[Engine]:
    """Serve metrics for as long as the block lasts. ``port``: 0 takes a free one."""
    served = Engine(page)
    application = web.Application()
    application.router.add_get("/metrics", served.metrics)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    served.port = runner.addresses[0][1]
    try:
        yield served
    finally:
        await runner.cleanup()


async def until(true: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until something holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110  what is waited for is told by no event
            await asyncio.sleep(0.005)
