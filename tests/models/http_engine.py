"""An engine over HTTP for tests and benchmarks: OpenAI's API, a prefix cache, KV events, metrics, and faults on demand.

    async with engine(prefill_tokens_per_s=20_000) as one:
        one.url, one.cache, one.requests
        one.fault = Fault("hang")

As a process, that prints its address (and those of its event port): ``python -m tests.models.http_engine --port 0``. Faults
are set there by ``POST /fault {"kind": "status", "status": 503, "times": 2}``; ``{}`` ends them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
from aiohttp import web
from msgspec.structs import replace

from kvatlas.ingest.publisher import EventPublisher
from tests.models.block_cache import BlockCache
from tests.models.engine_answers import Answer
from tests.models.engine_faults import JSON, Fault, PieceWriter, fail_early, failed
from tests.models.engine_prompts import ModelTokens, Tokenizer, Words, prompt_tokens

REQUESTS_KEPT_MAX = 10_000
LENGTH_MAX = 1 << 20
PIECES = 4
"""An answer that is no stream is written in so many pieces, where a fault or a permit may come between."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_FAULT = web.RequestKey("fault", Fault | None)


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is like. Times of 0: none."""

    host: str = "127.0.0.1"
    port: int = 0
    model: str = "tiny"
    pod: str | None = None
    """Its name in its events; by default its address."""
    tokenizer: str | None = None
    """A model's directory; None: words are tokens."""
    block_size: int = 16
    blocks_max: int = 4096
    prefill_tokens_per_s: float = 0.0
    token_s: float = 0.0
    output_tokens: int = 16
    """Where a request has no max_tokens."""
    events: bool = False
    """Publish KV events, and replay them."""


class Seen(msgspec.Struct, frozen=True):
    """A request as it came."""

    path: str
    headers: Mapping[str, str]
    """By lower-case name."""
    raw_headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class HttpEngine:
    """One engine. Made by :func:`engine`."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.cache = BlockCache(options.block_size, options.blocks_max)
        self.fault: Fault | None = None
        self.permits: asyncio.Semaphore | None = None
        """Where set: each piece of an answer's body needs one (see :meth:`step`)."""
        self.requests: deque[Seen] = deque(maxlen=REQUESTS_KEPT_MAX)
        self.waiting = 0
        """Prompts that have to wait for others to be computed."""
        self.running = 0
        self.tokens_in_use = 0
        """Prompt tokens of those that run."""
        self.finished = 0
        self.cancelled = 0
        """Requests whose client went away."""
        self.pieces_sent = 0
        self.bytes_sent = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.publisher: EventPublisher | None = None
        self.host, self.port = options.host, options.port
        self._tokenizer: Tokenizer = Words() if options.tokenizer is None else ModelTokens(Path(options.tokenizer))
        self._prefill = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._runner = web.AppRunner(self._app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        self._site: web.SockSite | None = None

    @property
    def authority(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.authority}"

    @property
    def connections(self) -> int:
        """Open ones, to whatever."""
        assert self._runner.server is not None
        return len(self._runner.server.connections)

    @property
    def kv_usage(self) -> float:
        """As in vLLM: cached blocks that no request uses are free. (Those that several use are counted for each of them.)"""
        return min(1.0, self.tokens_in_use / (self.cache.blocks_max * self.cache.block_size))

    async def start(self) -> None:
        await self._runner.setup()
        await self.listen()
        if self.options.events:
            topic = f"kv@{self.options.pod or self.authority}@{self.options.model}"
            self.publisher = EventPublisher(f"tcp://{self.host}:0", f"tcp://{self.host}:0", topic=topic)
            await self.publisher.__aenter__()

    async def listen(self) -> None:
        """Take connections again, on the port that it had."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        self.port = listener.getsockname()[1]
        self._site = web.SockSite(self._runner, listener)
        await self._site.start()

    async def refuse(self) -> None:
        """Refuse connections, and cut those there are: a process that died."""
        if self._site is not None:
            await self._site.stop()
            self._site = None
        assert self._runner.server is not None
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    async def close(self) -> None:
        if self.publisher is not None:
            await self.publisher.__aexit__(None, None, None)
        await self._runner.cleanup()

    def step(self, pieces: int = 1) -> None:
        """Allow so many further pieces of answers; with the first call pieces need permits."""
        if self.permits is None:
            self.permits = asyncio.Semaphore(0)
        for _ in range(pieces):
            self.permits.release()

    async def until(self, condition: Callable[[HttpEngine], bool]) -> None:
        """Wait until something is true of this engine."""
        async with self._changed:
            await self._changed.wait_for(lambda: condition(self))

    # -- requests -------------------------------------------------------------------------------------------------------

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._watch])
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"):
            app.router.add_post(path, self._generate)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        app.router.add_post("/fault", self._set_fault)
        return app

    @web.middleware
    async def _watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note every request, and let it fail where it is to."""
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append(Seen(request.path, headers, tuple(request.raw_headers), body))
        fault = request[_FAULT] = self._due(request.path)
        await self._tell()
        try:
            failure = None if fault is None else await fail_early(request, fault)
            return await handler(request) if failure is None else failure
        except (ValueError, TypeError, KeyError, IndexError) as problem:
            return failed(400, f"{type(problem).__name__}: {problem}")
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise
        finally:
            await self._tell()

    def _due(self, path: str) -> Fault | None:
        fault = self.fault
        if fault is None or not path.startswith(fault.path):
            return None
        if fault.times is not None:
            self.fault = replace(fault, times=fault.times - 1) if fault.times > 1 else None
        return fault

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        asked = msgspec.json.decode(await request.read())
        tokens = prompt_tokens(self._tokenizer, request.path, asked)
        with self._counted("waiting"):
            await self._prefill.acquire()
        with self._counted("running"), self._in_use(len(tokens)):
            try:
                answer = await self._compute(request.path, asked, tokens)
            finally:
                self._prefill.release()
            response = await (self._stream if asked.get("stream") else self._whole)(request, asked, answer)
        self.finished += 1
        return response

    async def _compute(self, path: str, asked: Mapping[str, Any], tokens: list[int]) -> Answer:
        """Fill the cache. Called for one prompt after the other."""
        served = self.cache.serve(tokens)
        if self.options.prefill_tokens_per_s:
            await asyncio.sleep((len(tokens) - served.cached_tokens) / self.options.prefill_tokens_per_s)
        if self.publisher is not None and served.events:
            await self.publisher.publish(msgspec.msgpack.encode([time.time(), served.events, 0]))
        self.prompt_tokens += len(tokens)
        self.cached_tokens += served.cached_tokens
        limits = (asked.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"))
        output = next((int(limit) for limit in limits if limit is not None), self.options.output_tokens)
        return Answer(path, self.finished, self.options.model, len(tokens), served.cached_tokens, output)

    async def _stream(self, request: web.Request, asked: Mapping[str, Any], answer: Answer) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        writer = PieceWriter(request, response, request[_FAULT])
        for piece in answer.events(usage=bool((asked.get("stream_options") or {}).get("include_usage"))):
            if self.options.token_s:
                await asyncio.sleep(self.options.token_s)
            await self._write(writer, piece)
        await response.write_eof()
        return response

    async def _whole(self, request: web.Request, _asked: Mapping[str, Any], answer: Answer) -> web.StreamResponse:
        if self.options.token_s:
            await asyncio.sleep(self.options.token_s * answer.output_tokens)
        body = answer.whole()
        headers = self._orca(request)
        if request[_FAULT] is None and self.permits is None:
            return web.Response(body=body, content_type=JSON, headers=headers)
        response = web.StreamResponse(headers={"Content-Type": JSON, "Content-Length": str(len(body)), **headers})
        await response.prepare(request)
        writer = PieceWriter(request, response, request[_FAULT])
        size = -(-len(body) // PIECES)
        for start in range(0, len(body), size):
            await self._write(writer, body[start : start + size])
        return response

    def _orca(self, request: web.Request) -> dict[str, str]:
        """Tell load where a request asks for it, in JSON, and with answers that are no streams, as vLLM does."""
        if request.headers.get("endpoint-load-metrics-format", "").lower() != "json":
            return {}
        told = {"named_metrics": {"kv_cache_usage_perc": self.kv_usage, "num_requests_waiting": float(self.waiting)}}
        return {"endpoint-load-metrics": f"JSON {msgspec.json.encode(told).decode()}"}

    async def _write(self, writer: PieceWriter, piece: bytes) -> None:
        if self.permits is not None:
            await self.permits.acquire()
        await writer.write(piece)
        self.bytes_sent += len(piece)
        self.pieces_sent += 1
        await self._tell()

    async def _tokenize(self, request: web.Request) -> web.Response:
        tokens = prompt_tokens(self._tokenizer, request.path, msgspec.json.decode(await request.read()))
        return web.json_response({"count": len(tokens), "max_model_len": LENGTH_MAX, "tokens": tokens})

    async def _models(self, _request: web.Request) -> web.Response:
        model = {"id": self.options.model, "object": "model", "created": 1, "owned_by": "vllm", "max_model_len": LENGTH_MAX}
        return web.json_response({"object": "list", "data": [model]})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, _request: web.Request) -> web.Response:
        labels = f'engine="0",model_name="{self.options.model}"'
        config = f'block_size="{self.cache.block_size}",engine="0",num_gpu_blocks="{self.cache.blocks_max}"'
        lines = [
            f"vllm:num_requests_waiting{{{labels}}} {self.waiting}",
            f"vllm:num_requests_running{{{labels}}} {self.running}",
            f"vllm:kv_cache_usage_perc{{{labels}}} {self.kv_usage}",
            f"vllm:prefix_cache_queries_total{{{labels}}} {self.prompt_tokens}",
            f"vllm:prefix_cache_hits_total{{{labels}}} {self.cached_tokens}",
            f"vllm:cache_config_info{{{config}}} 1.0",
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def _set_fault(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.fault = None if body in {b"", b"{}"} else msgspec.json.decode(body, type=Fault)
        return web.Response()

    @contextmanager
    def _counted(self, name: Literal["waiting", "running"]) -> Iterator[None]:
        setattr(self, name, getattr(self, name) + 1)
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) - 1)

    @contextmanager
    def _in_use(self, tokens: int) -> Iterator[None]:
        self.tokens_in_use += tokens
        try:
            yield
        finally:
            self.tokens_in_use -= tokens

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@asynccontextmanager
async def engine(**options: Any) -> AsyncIterator[HttpEngine]:
    """Run an engine in this event loop for as long as the block lasts. ``options``: see EngineOptions."""
    one = HttpEngine(EngineOptions(**options))
    await one.start()
    try:
        yield one
    finally:
        await one.close()


async def _serve(options: EngineOptions) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    one = HttpEngine(options)
    await one.start()
    publisher = one.publisher
    print(*(one.url, *(() if publisher is None else (publisher.endpoint, publisher.replay_endpoint))), flush=True)
    try:
        await stop.wait()
    finally:
        await one.close()


def main() -> None:
    """Serve until SIGTERM or SIGINT. Every option of EngineOptions is a flag: ``--output-tokens 8``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in msgspec.structs.fields(EngineOptions):
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default)
    given = vars(parser.parse_args())
    options = msgspec.convert(given, EngineOptions, strict=False)
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.install()
    asyncio.run(_serve(options))


if __name__ == "__main__":
    main()
