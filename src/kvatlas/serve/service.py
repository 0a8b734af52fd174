"""The service: index, HTTP and gRPC in one process, from start to graceful stop."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import math
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial

import msgspec
import uvicorn
import uvloop
from fastapi import FastAPI

from kvatlas.config import ApiSettings, Config
from kvatlas.errors import ConfigError
from kvatlas.index.choice import REMEDY, native_version, why_no_native
from kvatlas.indexer import Indexer
from kvatlas.netloc import netloc
from kvatlas.observe.logs import configure_logs, get_logger
from kvatlas.serve.connection import timed_protocol
from kvatlas.serve.dashboard.http import DashboardRoutes
from kvatlas.serve.dashboard.sampler import Sampler
from kvatlas.serve.gate import Gate
from kvatlas.serve.grpc import GrpcServer
from kvatlas.serve.http import build_app
from kvatlas.serve.listening import bind
from kvatlas.serve.routing.setup import DoorAddresses, Routing, read_picker
from kvatlas.serve.stopping import Stopping, stopping_by
from kvatlas.serve.workers.worker import Worker, show_worker
from kvatlas.tokens.setup import make_tokenization
from kvatlas.tokens.tokenization import Tokenization

READY_POLL_S = 0.25
GARBAGE_MIN = 10_000
"""Objects made, less those gone, after which the youngest are looked through for cycles."""

_log = get_logger(__name__)


class Addresses(msgspec.Struct, frozen=True):
    """Where a running service listens: ports as bound, also where 0 was configured."""

    http: str
    grpc: str
    events: str | None
    """Where engines can connect to publish events; None where kvatlas connects to them."""
    proxy: str | None = None
    """Where the router's proxy takes requests; None where it is not open."""
    ext_proc: str | None = None
    """Where Envoy asks the endpoint picker; None where it is not open."""


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, with logs on standard error. Raises ConfigError or SourceError where it cannot start."""
    configure_logs(config.log)
    uvloop.run(serve(config, ready=keep_what_is_loaded))


def keep_what_is_loaded() -> None:
    """Take what is in memory for what stays, for a process that does nothing but serve: the collector does not walk it again.

    Libraries and tokenizers are some hundred thousand objects; walking them stopped every request for 50 to 100 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_MIN, 20, 50)


async def serve(
    config: Config,
    *,
    stop: asyncio.Event | None = None,
    started: Callable[[Addresses], None] | None = None,
    ready: Callable[[], None] | None = None,
    worker: Worker | None = None,
) -> None:
    """Serve until ``stop`` is set; without it until SIGTERM or SIGINT (a second one cuts the grace short).

    ``started`` is called once everything listens, ``ready`` once what is to be loaded is; ``worker``: which of several
    processes this is. Stopping refuses new work at once, lets requests in progress finish within api.shutdownGrace, then
    closes the index. Raises ConfigError or SourceError where an address cannot be had; nothing is left running then.
    """
    with stopping_by(stop) as stopping:
        async with AsyncExitStack() as cleanup:
            await _serve(config, stopping, cleanup, started, ready, worker)


async def _serve(
    config: Config,
    stopping: Stopping,
    cleanup: AsyncExitStack,
    started: Callable[[Addresses], None] | None,
    ready: Callable[[], None] | None,
    worker: Worker | None,
) -> None:
    api = config.api
    picker = None
    if config.route.front_doors:
        config, picker = read_picker(config)
    indexer = Indexer(config)
    _tell_core(config, indexer.index.core)
    gate = Gate(api.concurrency_max)
    cleanup.callback(gate.close)
    indexer.metrics.observe_queries(lambda: gate.in_progress)
    tokenization = make_tokenization(config.tokens, indexer.metrics)
    cleanup.callback(tokenization.close)
    tokenization.warm()
    routing = None if picker is None else Routing(config, indexer, tokenization, picker)
    if worker is not None:
        show_worker(worker, indexer.metrics.registry)
    shown = _dashboard(indexer, routing, worker, cleanup) if api.dashboard else None
    http = _http_server(api, build_app(indexer, tokenization, gate, None if routing is None else routing.routes(worker), shown))
    listener = bind("api", api.host, api.port, listen=True)
    cleanup.callback(listener.close)
    grpc_server = GrpcServer(indexer, tokenization, gate)
    cleanup.push_async_callback(grpc_server.stop, 0)
    grpc_port = grpc_server.bind()
    cleanup.push_async_callback(asyncio.to_thread, indexer.close)
    await asyncio.to_thread(indexer.start)
    await grpc_server.start()
    doors = DoorAddresses()
    if routing is not None:
        cleanup.push_async_callback(routing.stop, at_once=True)
        doors = await routing.start()
    http_port = listener.getsockname()[1]
    http_task = asyncio.create_task(http.serve(sockets=[listener]))
    ready_task = asyncio.create_task(_follow_readiness(indexer, tokenization, grpc_server, routing, ready))
    for event in (http.listening, stopping.asked):
        http_task.add_done_callback(partial(_set, event))  # should HTTP end by itself, the service ends
    try:
        await http.listening.wait()
        addresses = _addresses(api, http_port, grpc_port, indexer.event_endpoint, doors)
        _announce(api, addresses)
        if started is not None:
            started(addresses)
        await stopping.asked.wait()
    finally:
        ready_task.cancel()
        gate.drain()
        routed = {} if routing is None else {"routed_in_progress": routing.in_progress}
        _log.info("stopping", in_progress=gate.in_progress, grace_s=api.shutdown_grace, **routed)
        if routing is not None:
            await _close_doors(stopping, routing)
        await _end(stopping, http, http_task, grpc_server, api.shutdown_grace)
    _log.info("stopped")


def _dashboard(indexer: Indexer, routing: Routing | None, worker: Worker | None, cleanup: AsyncExitStack) -> DashboardRoutes:
    """Return the page's routes; what it shows is looked at until the cleanup."""
    sampler = Sampler(indexer, worker=worker) if routing is None else Sampler(indexer, routing.router, routing.health, worker)
    looking = asyncio.create_task(sampler.run())
    cleanup.callback(looking.cancel)
    return DashboardRoutes(sampler)


async def _end(stopping: Stopping, http: _Http, http_task: asyncio.Task[None], grpc_server: GrpcServer, grace_s: float) -> None:
    """End both servers within the grace, or at once where that is asked for meanwhile."""

    async def cut_short() -> None:
        await stopping.at_once.wait()
        http.force_exit = True
        await grpc_server.stop(0)

    http.should_exit = True
    cutter = asyncio.create_task(cut_short())
    grpc_task = asyncio.create_task(grpc_server.stop(grace_s))
    _, late = await asyncio.wait({http_task, grpc_task}, timeout=grace_s + 2)
    for task in (cutter, *late):
        task.cancel()
    if http_task not in late:
        http_task.result()


async def _close_doors(stopping: Stopping, routing: Routing) -> None:
    """Let routed requests finish within the front doors' own grace, or at once where that is asked for meanwhile."""
    closing = asyncio.create_task(routing.stop())
    at_once = asyncio.create_task(stopping.at_once.wait())
    await asyncio.wait({closing, at_once}, return_when="FIRST_COMPLETED")
    at_once.cancel()
    if not closing.done():
        closing.cancel()
        await routing.stop(at_once=True)


async def _follow_readiness(
    indexer: Indexer,
    tokenization: Tokenization,
    server: GrpcServer,
    routing: Routing | None,
    ready: Callable[[], None] | None,
) -> None:
    """Keep gRPC's health as the index is; a change is seen within READY_POLL_S.

    A router takes requests while the index catches up: it goes by history and load until then.
    """
    if routing is not None:
        await routing.set_ready(True)
    while True:
        loaded = tokenization.ready()[0]
        await server.set_ready(indexer.ready()[0] and loaded)
        if loaded and ready is not None:
            ready()
            ready = None
        await asyncio.sleep(READY_POLL_S)


def _set(event: asyncio.Event, _ended: asyncio.Task[None]) -> None:
    event.set()


class _Http(uvicorn.Server):
    """uvicorn, with signals left to the service, which has more than HTTP to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _http_server(api: ApiSettings, app: FastAPI) -> _Http:
    config = uvicorn.Config(
        app,
        http=timed_protocol(api.request_timeout),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,  # its lines carry query strings, and so token ids
        proxy_headers=False,
        server_header=False,
        limit_concurrency=api.connections_max,
        timeout_graceful_shutdown=math.ceil(api.shutdown_grace),
        ssl_certfile=api.tls_cert_file,
        ssl_keyfile=api.tls_key_file,
    )
    try:
        config.load()
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError("api.tlsCertFile", f"no use with api.tlsKeyFile: {reason}", "a PEM chain and its key") from None
    return _Http(config)


def _addresses(api: ApiSettings, http_port: int, grpc_port: int, events: str | None, doors: DoorAddresses) -> Addresses:
    scheme = "http" if api.tls_cert_file is None else "https"
    http = f"{scheme}://{netloc(api.host, http_port)}"
    return Addresses(http, netloc(api.grpc_host, grpc_port), events, doors.proxy, doors.ext_proc)


def _tell_core(config: Config, core: str) -> None:
    """Say which core runs; a warning where it is the slow one and nobody asked for it."""
    missing = why_no_native() if config.index.core == "auto" else None
    if core == "native":
        _log.info("core", core=core, version=native_version())
    elif missing is None:
        _log.info("core", core=core)
    else:
        _log.warning("the native core is missing", core=core, reason=missing, remedy=REMEDY)


def _announce(api: ApiSettings, addresses: Addresses) -> None:
    doors = {name: address for name, address in (("proxy", addresses.proxy), ("ext_proc", addresses.ext_proc)) if address}
    docs = f"{addresses.http}/docs"
    _log.info("serving", http=addresses.http, docs=docs, grpc=addresses.grpc, events=addresses.events, **doors)
    if api.token is None and not (_is_loopback(api.host) and _is_loopback(api.grpc_host)):
        _log.warning("anyone who reaches these addresses can query and publish events; set api.token to prevent it")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
