"""An embedded engine as a server: its API, its event ports, its clock, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Middleware

from kvatlas.errors import ConfigError
from kvatlas.ingest.publisher import EventPublisher
from kvatlas.keys.engine import EngineKeys
from kvatlas.keys.engine_hashes import HashScheme
from kvatlas.netloc import netloc
from kvatlas.serve.listening import bind
from kvatlas.serve.stopping import stopping_by
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.live.api import EngineApi, EventSource
from kvatlas.sim.live.engine import LiveEngine
from kvatlas.sim.live.faults import Fault, Faults
from kvatlas.sim.live.kv_events import KvEvents
from kvatlas.sim.live.metrics import EngineMetrics
from kvatlas.sim.live.tokens import EngineTokens, packaged_tokenizer
from kvatlas.sim.reference import ReferenceEngines

DEFAULT_MODEL = "tiny"
AT_ONCE_S = 0.1
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  compared with, not bound


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an embedded engine is like, beside what it simulates. A port of 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 0
    events_port: int = 0
    replay_port: int = 0
    model: str = DEFAULT_MODEL
    aliases: tuple[str, ...] = ()
    """Other names of the model that requests may have."""
    pod: str | None = None
    """Its name in its events; None: its address."""
    tokenizer: Path | None = None
    """A model's directory; None: the packaged one."""
    max_model_len: int | None = None
    """None: the tokenizer's, as far as the cache holds it."""
    scheme: HashScheme = HashScheme("sha256_cbor", "0")
    """How it hashes blocks."""
    output_tokens: int = 64
    """Of a chat that does not say."""
    requests_max: int = 1024
    """In progress; further ones are answered with 503."""
    speed: float = 1.0
    """How many of its seconds pass in one of ours."""
    faults: tuple[Fault, ...] = ()
    """What goes wrong from the start."""
    drain_s: float = 10.0
    """How long requests in progress may take to end once it is to stop."""


class Started(msgspec.Struct, frozen=True):
    """Where an engine listens."""

    url: str
    events: str
    replay: str
    pod: str
    model: str


async def serve(
    spec: EngineSpec,
    options: EngineOptions,
    *,
    stop: asyncio.Event | None = None,
    started: Callable[[Started], None] = lambda _started: None,
) -> None:
    """Run an engine until ``stop`` is set; None: until SIGTERM or SIGINT, at once with the second one.

    Raises ConfigError where a port cannot be had or the tokenizer does not serve, TokenizationError where it does not load.
    """
    async with running(spec, options) as engine:
        with stopping_by(stop) as stopping:
            started(engine.started)
            await _first(stopping.asked.wait(), asyncio.wait({engine.task}))
            await _first(stopping.at_once.wait(), engine.drain(options.drain_s))


async def _first(*awaited: Coroutine[Any, Any, object]) -> None:
    """Return when one of these has ended; the others are cancelled."""
    tasks = [asyncio.create_task(one) for one in awaited]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


class RunningEngine:
    """A server that listens. Made by :func:`running`."""

    def __init__(
        self,
        started: Started,
        live: LiveEngine,
        task: asyncio.Task[None],
        api: EngineApi,
        runner: web.AppRunner,
        faults: Faults,
    ) -> None:
        self.started = started
        self.live = live
        self.task = task
        """Drives the engine; done only if that failed."""
        self.runner = runner
        """Has the API's socket and connections."""
        self.faults = faults
        self._api = api

    async def drain(self, timeout_s: float) -> None:
        """Take no more connections, and wait for requests in progress, for so long."""
        for site in self.runner.sites:
            await site.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._api.idle()


@asynccontextmanager
async def running(
    spec: EngineSpec, options: EngineOptions, tokens: EngineTokens | None = None, middlewares: Sequence[Middleware] = ()
) -> AsyncIterator[RunningEngine]:
    """Run an engine in this event loop for as long as the block lasts. What fails meanwhile is raised at its end.

    ``tokens``: None loads what the options name. ``middlewares``: what else is done around each request, outermost first.
    """
    if options.pod is None and options.host in EVERYWHERE:
        raise ConfigError("--pod", f"is needed with --host {options.host}", "what events are to call this engine: IP:PORT")
    capacity = _capacity(spec)
    if options.max_model_len is not None and options.max_model_len > capacity:
        problem = f"{options.max_model_len} tokens do not fit into {spec.gpu_blocks} blocks of {spec.block_size_tokens}"
        raise ConfigError("--max-model-len", problem, f"at most {capacity}, or more --gpu-blocks")
    if tokens is None:
        tokens = await asyncio.to_thread(load_tokens, options)
    listener = bind("engine", options.host, options.port, listen=True)
    authority = netloc(options.host, listener.getsockname()[1])
    topic = f"kv@{options.pod or authority}@{options.model}"
    ports = (netloc(options.host, port) for port in (options.events_port, options.replay_port))
    events, replay = (f"tcp://{one}" for one in ports)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listener.close)
        publisher = await stack.enter_async_context(EventPublisher(events, replay, topic=topic))
        assert publisher.replay_endpoint is not None
        faults = Faults(options.faults)
        live, api = _made(spec, options, tokens, publisher, topic, faults)
        runner = web.AppRunner(
            api.app(middlewares), access_log=None, logger=_logger(), handler_cancellation=True, shutdown_timeout=AT_ONCE_S
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, listener).start()
        task = await stack.enter_async_context(_kept(live))
        where = Started(
            f"http://{authority}", publisher.endpoint, publisher.replay_endpoint, options.pod or authority, options.model
        )
        yield RunningEngine(where, live, task, api, runner, faults)


def _made(
    spec: EngineSpec, options: EngineOptions, tokens: EngineTokens, publisher: EventPublisher, topic: str, faults: Faults
) -> tuple[LiveEngine, EngineApi]:
    """Return an engine that publishes its events, and its API."""
    metrics = EngineMetrics(options.model, spec.block_size_tokens, spec.gpu_blocks)

    async def publish(payload: bytes) -> None:
        if faults.of_events() is None:
            await publisher.publish(payload)
        else:
            publisher.next_seq += 1

    live = LiveEngine(
        ReferenceEngines(),
        spec,
        events=KvEvents(spec.block_size_tokens, [tier.name for tier in spec.tiers]),
        publish=publish,
        metrics=metrics,
        speed=options.speed,
    )
    api = EngineApi(
        live,
        tokens,
        EngineKeys(options.scheme, spec.block_size_tokens),
        metrics,
        models=(options.model, *options.aliases),
        max_model_len=min(tokens.max_model_len, _capacity(spec)),
        output_tokens=options.output_tokens,
        requests_max=options.requests_max,
        sources=[EventSource(0, publisher.endpoint, publisher.replay_endpoint, topic)],
        faults=faults,
    )
    return live, api


def _capacity(spec: EngineSpec) -> int:
    """Return how many tokens a whole cache holds: one block is never used."""
    return (spec.gpu_blocks - 1) * spec.block_size_tokens


@asynccontextmanager
async def _kept(live: LiveEngine) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(live.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _logger() -> logging.Logger:
    """Return a logger that tells of what is no HTTP/1.1 request, an HTTP/2 probe say, in a line and without a traceback."""
    logger = logging.getLogger("kvatlas.engine")
    logger.addFilter(_shortened)
    return logger


def _shortened(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], HttpProcessingError):
        record.msg += ": this is no HTTP/1.1"
        record.exc_info = None
    return True


def load_tokens(options: EngineOptions) -> EngineTokens:
    """Return the tokenizer that options name. Takes a second or two."""
    if options.tokenizer is not None:
        if not (options.tokenizer / "tokenizer.json").is_file():
            raise ConfigError(
                "--tokenizer", f"{options.tokenizer} has no tokenizer.json", "a Hugging Face tokenizer's directory"
            )
        return EngineTokens(options.model, options.tokenizer, options.max_model_len)
    with packaged_tokenizer() as directory:
        return EngineTokens(options.model, directory, options.max_model_len)
