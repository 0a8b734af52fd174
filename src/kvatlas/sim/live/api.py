"""An embedded engine's HTTP API: OpenAI's, with the routes of vLLM that a router or a renderer uses."""

from __future__ import annotations

import asyncio
import itertools
from array import array
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from kvatlas.errors import RequestError, TokensError
from kvatlas.keys.engine import EngineKeys
from kvatlas.serve.schema import read_body
from kvatlas.sim.live.answers import Answer
from kvatlas.sim.live.engine import Generation, LiveEngine
from kvatlas.sim.live.faults import KINDS, FaultList, Faults
from kvatlas.sim.live.metrics import EngineMetrics
from kvatlas.sim.live.requests import (
    CHAT,
    COMPLETION,
    Asked,
    read_detokenize,
    read_generation,
    read_tokenize,
)
from kvatlas.sim.live.sending import JSON, Sender, refused
from kvatlas.sim.live.tokens import EngineTokens

BODY_BYTES_MAX = 64 << 20
FAULTS_FORM = (
    'send {"faults": [{"kind": "cut", "share": 0.1, "times": 3}]}; kinds: '
    f'{", ".join(KINDS)}; "status" takes a status from 400 to 599, "cut" and "stall" take "after", in tokens'
)
LOAD_FORMAT = "endpoint-load-metrics-format"
LOAD = "endpoint-load-metrics"


class EventSource(msgspec.Struct, frozen=True):
    """Where an engine's KV events are had, as ``/kv_event_sources`` of vLLM tells it."""

    data_parallel_rank: int
    endpoint: str
    replay_endpoint: str | None
    topic: str


class EngineApi:
    """Routes to one engine.

    ``models``: its model's names. ``output_tokens``: a chat's where it does not say. ``requests_max``: beyond it, 503.
    """

    def __init__(
        self,
        engine: LiveEngine,
        tokens: EngineTokens,
        keys: EngineKeys,
        metrics: EngineMetrics,
        *,
        models: Sequence[str],
        max_model_len: int,
        output_tokens: int,
        requests_max: int,
        sources: Sequence[EventSource],
        faults: Faults,
    ) -> None:
        self._engine = engine
        self._tokens = tokens
        self._keys = keys
        self._metrics = metrics
        self._models = models
        self._model = models[0]
        self._max_model_len = max_model_len
        self._output_tokens = output_tokens
        self._requests_max = requests_max
        self._sources = sources
        self._faults = faults
        self._numbers = itertools.count(1)
        self._in_progress = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Return when no request is in progress."""
        await self._idle.wait()

    def app(self, middlewares: Sequence[Middleware] = ()) -> web.Application:
        """Return the routes. ``middlewares``: what else is done around each request."""
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[*middlewares, _failures])
        for path in (COMPLETION, CHAT):
            app.router.add_post(path, self._generate)
            app.router.add_post(f"{path}/render", self._render)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_post("/reset_prefix_cache", self._reset)
        app.router.add_get("/v1/models", self._list)
        app.router.add_get("/metrics", self._page)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/kv_event_sources", self._event_sources)
        app.router.add_get("/faults", self._show_faults)
        app.router.add_put("/faults", self._set_faults)
        return app

    # -- generation -----------------------------------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if self._in_progress >= self._requests_max:
            return refused(503, f"{self._in_progress} requests are in progress; send it again later", "ServiceUnavailable")
        self._in_progress += 1
        self._idle.clear()
        try:
            sender = Sender(request, self._faults)
            failed = await sender.fail_early()
            if failed is not None:
                return failed
            asked = read_generation(request.path, self._model, await request.read())
            self._check_model(asked)
            generation = await asyncio.to_thread(self._begun, asked)
            answer = Answer(asked, generation, self._tokens, self._model, chat=request.path == CHAT)
            self._engine.submit(generation)
            try:
                if asked.stream:
                    return await sender.stream(generation, answer)
                return await sender.whole(generation, answer, lambda: self._load(request))
            finally:
                self._engine.abort(generation)
        finally:
            self._in_progress -= 1
            if not self._in_progress:
                self._idle.set()

    def _begun(self, asked: Asked) -> Generation:
        """Return a request with its tokens, its answer's, and their hashes. Takes a while: not for the event loop."""
        prompt = self._prompt_tokens(asked)
        room = self._max_model_len - len(prompt)
        wanted = asked.output_tokens or min(self._output_tokens, max(1, room))
        if wanted > room:
            problem = f"{len(prompt)} tokens of prompt and {wanted} of output are more than the model takes"
            raise RequestError(
                "max_tokens" if room > 0 else "prompt", problem, f"at most {self._max_model_len} tokens fit, with the answer"
            )
        tokens = prompt + self._tokens.answer(prompt, wanted)
        keys = array("Q", self._keys.keys(tokens, self._model, cache_salt=asked.cache_salt))
        return Generation(next(self._numbers), tokens, len(prompt), keys, asked.cache_salt)

    def _load(self, request: web.Request) -> dict[str, str]:
        """Tell load where a request asks for it, with answers that are no streams, as vLLM does."""
        form = request.headers.get(LOAD_FORMAT, "").upper()
        if form not in {"JSON", "TEXT"}:
            return {}
        state = self._engine.state
        figures = {
            "kv_cache_usage_perc": self._metrics.usage(state),
            "num_requests_waiting": float(state.waiting),
            "num_requests_running": float(state.running),
        }
        if form == "JSON":
            return {LOAD: f"JSON {msgspec.json.encode({'named_metrics': figures}).decode()}"}
        return {LOAD: "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in figures.items())}

    # -- tokens ---------------------------------------------------------------------------------------------------------

    def _prompt_tokens(self, asked: Asked) -> array[int]:
        tokens = asked.token_ids if asked.prompt is None else self._tokens.tokens(asked.prompt)
        if not tokens:
            raise RequestError("prompt", "is empty", "send one token at least")
        return tokens

    async def _render(self, request: web.Request) -> web.Response:
        asked = read_generation(request.path, self._model, await request.read())
        self._check_model(asked)
        tokens = await asyncio.to_thread(self._prompt_tokens, asked)
        rendered = {"token_ids": tokens.tolist(), "features": None, "cache_salt": asked.cache_salt, "model": self._model}
        return _answered(rendered if request.path.startswith(CHAT) else [rendered])

    async def _tokenize(self, request: web.Request) -> web.Response:
        asked = read_tokenize(self._model, await request.read())
        self._check_model(asked)
        tokens = (await asyncio.to_thread(self._prompt_tokens, asked)).tolist()
        return _answered({"count": len(tokens), "max_model_len": self._max_model_len, "tokens": tokens, "token_strs": None})

    async def _detokenize(self, request: web.Request) -> web.Response:
        return _answered({"prompt": self._tokens.text(read_detokenize(await request.read()))})

    # -- what an engine says of itself ----------------------------------------------------------------------------------

    async def _reset(self, _request: web.Request) -> web.Response:
        done = await self._engine.reset_cache()
        if done:
            return web.Response()
        return refused(500, "requests run; try again later", "InternalServerError")

    async def _list(self, _request: web.Request) -> web.Response:
        shared = {"object": "model", "created": 0, "owned_by": "kvatlas", "root": self._model}
        listed = [{"id": name, **shared, "max_model_len": self._max_model_len} for name in self._models]
        return _answered({"object": "list", "data": listed})

    async def _page(self, _request: web.Request) -> web.Response:
        body = self._metrics.page(lambda: self._engine.state)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _request: web.Request) -> web.Response:
        return _answered({"version": f"kvatlas {version('kvatlas')}"})

    async def _event_sources(self, _request: web.Request) -> web.Response:
        return _answered(self._sources)

    # -- what goes wrong ------------------------------------------------------------------------------------------------

    async def _show_faults(self, _request: web.Request) -> web.Response:
        return _answered(FaultList(self._faults.listed))

    async def _set_faults(self, request: web.Request) -> web.Response:
        try:
            asked = read_body(await request.read(), FaultList)
        except RequestError as error:
            raise RequestError(error.field, error.problem, FAULTS_FORM) from None
        self._faults.set(*asked.faults)
        return _answered(asked)

    def _check_model(self, asked: Asked) -> None:
        if asked.model is not None and asked.model not in self._models:
            raise _NoModelError("model", f"{asked.model!r:.100} does not exist", f"ask for {self._model!r}")


class _NoModelError(RequestError):
    """404, as vLLM answers."""


@web.middleware
async def _failures(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer what is wrong with a request in OpenAI's form."""
    try:
        return await handler(request)
    except _NoModelError as error:
        return refused(404, str(error), "NotFoundError", error.field)
    except RequestError as error:
        return refused(400, str(error), "BadRequestError", error.field)
    except TokensError as error:
        return refused(400, str(error), "BadRequestError", "prompt")
    except web.HTTPException as error:
        return refused(error.status, f"{request.method} {request.path}: {error.reason}", "BadRequestError")


def _answered(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type=JSON)
