"""Engines as processes: the tests' engine over HTTP, forked from a process that has imported it, so that they start at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from tests.models.http_engine import EngineOptions, HttpEngine


class Counts(msgspec.Struct, frozen=True):
    """What engines did so far."""

    prompt_tokens: int
    cached_tokens: int
    finished: int

    def since(self, before: Counts) -> Counts:
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(before), strict=True)
        return Counts(*(now - then for now, then in pairs))


class Engine:
    """One engine's addresses, and a line to ask it over."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.url, self.events, self.replay = pipe.recv()

    def counts(self) -> Counts:
        self._pipe.send(None)
        return Counts(*self._pipe.recv())


@contextmanager
def engines(count: int, **options: Any) -> Iterator[list[Engine]]:
    """Run engines with KV events until the block ends. ``options``: see EngineOptions."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.models.http_engine"])
    pipes, processes = [], []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(EngineOptions(events=True, **options), theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        yield [Engine(pipe) for pipe in pipes]
    finally:
        for pipe in pipes:
            pipe.close()  # an engine ends with its line
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _run(options: EngineOptions, pipe: Connection) -> None:
    import uvloop

    logging.disable()  # some routers ask for HTTP/2 first, and are told no
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve(options, pipe))


async def _serve(options: EngineOptions, pipe: Connection) -> None:
    one = HttpEngine(options)
    await one.start()
    assert one.publisher is not None
    pipe.send((one.url, one.publisher.endpoint, one.publisher.replay_endpoint))
    with contextlib.suppress(EOFError):
        while True:
            await asyncio.to_thread(pipe.recv)
            pipe.send((one.prompt_tokens, one.cached_tokens, one.finished))
    await one.close()
