"""Engines that routers are put before: those of ``kvatlas engine``, all of them in one process of their own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import urllib.request
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from multiprocessing.connection import Connection

import msgspec

from benchmarks.sides.routers import MODEL
from kvatlas.discovery.metric_lines import samples
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.live.server import EngineOptions, Started, load_tokens, running


class Counts(msgspec.Struct, frozen=True):
    """What engines did so far."""

    prompt_tokens: float
    cached_tokens: float
    finished: float

    def since(self, before: Counts) -> Counts:
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(before), strict=True)
        return Counts(*(now - then for now, then in pairs))


_METRICS = (b"vllm:prefix_cache_queries_total", b"vllm:prefix_cache_hits_total", b"vllm:request_success_total")


def counts(engine: Started) -> Counts:
    """Return what an engine counted."""
    with urllib.request.urlopen(f"{engine.url}/metrics", timeout=10) as answer:  # noqa: S310  it is ours
        page = answer.read()
    return Counts(*(sum(sample.value for sample in samples(page, name)) for name in _METRICS))


class EngineHost:
    """A process that runs engines when it is asked to: it has loaded what they need. Made by :func:`engine_host`."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    @contextmanager
    def engines(self, count: int, spec: EngineSpec) -> Iterator[list[Started]]:
        """Run fresh engines with KV events until the block ends."""
        self._pipe.send((count, spec))
        started: list[Started] = self._pipe.recv()
        yield started
        self._pipe.send(None)


@contextmanager
def engine_host() -> Iterator[EngineHost]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_host, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield EngineHost(ours)
    finally:
        ours.close()  # it ends with its line
        process.join(timeout=10)
        process.kill()


def _host(pipe: Connection) -> None:
    import uvloop

    logging.disable()  # some routers ask for HTTP/2 first, and are told no
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        uvloop.run(_serve(pipe))


async def _serve(pipe: Connection) -> None:
    options = EngineOptions(model=MODEL)
    tokens = load_tokens(options)
    while True:
        count, spec = await asyncio.to_thread(pipe.recv)
        async with AsyncExitStack() as stack:
            engines = [await stack.enter_async_context(running(spec, options, tokens)) for _ in range(count)]
            pipe.send([engine.started for engine in engines])
            await asyncio.to_thread(pipe.recv)
