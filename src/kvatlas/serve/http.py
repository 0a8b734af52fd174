"""The HTTP API: routes and nothing else. Bodies are in schema.py, their documentation in openapi.py."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable
from typing import TypeAlias

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from kvatlas.errors import RequestError
from kvatlas.serve.body import read_bytes
from kvatlas.serve.dashboard.http import FILES, DashboardRoutes
from kvatlas.serve.edge import CLIENT_GONE, Edge
from kvatlas.serve.faults import JSON, add_fault_handlers
from kvatlas.serve.gate import Gate
from kvatlas.serve.openapi import OPERATIONS, install_components
from kvatlas.serve.prompts import (
    NO_PROMPT,
    Prompts,
    Question,
    ToldPrompt,
    asked_chat_completion,
    asked_completion,
    asked_prompt,
    has_prompt,
)
from kvatlas.serve.queries import ServedIndex, checked_keys, key_text, known_parameters
from kvatlas.serve.routing.http import RoutingRoutes
from kvatlas.serve.schema import (
    BlockAnswer,
    CandidatesAnswer,
    CandidatesBody,
    HealthAnswer,
    LlmdChatBody,
    LlmdCompletionBody,
    LocalityAnswer,
    LocalityBody,
    PodsAnswer,
    ScoreBody,
    read_body,
)
from kvatlas.tokens.tokenization import Tokenization
from kvatlas.types import BlockKey, PodId

Answer: TypeAlias = msgspec.Struct | dict[PodId, float]

_OPEN_PATHS = ("/healthz", "/readyz", "/docs", "/openapi.json")


def build_app(
    indexer: ServedIndex,
    tokenization: Tokenization,
    gate: Gate | None = None,
    routing: RoutingRoutes | None = None,
    dashboard: DashboardRoutes | None = None,
) -> FastAPI:
    """Return the API over an index. ``gate``: shared with gRPC where that is there; ``routing``: shows the router;
    ``dashboard``: shows the fleet, to people."""
    api = indexer.config.api
    prompts = Prompts(indexer.config, tokenization, indexer.metrics)
    routes = _Routes(indexer, prompts, gate or Gate(api.concurrency_max))
    app = FastAPI(
        title="kvatlas",
        version=importlib.metadata.version("kvatlas"),
        description="Which KV-cache blocks sit on which LLM engine, and who holds the longest prefix of a prompt.",
        docs_url="/docs",
        redoc_url=None,
    )
    endpoints: list[tuple[str, str, Callable[..., object]]] = [
        ("GET", "/v1/locality", routes.locality_by_url),
        ("POST", "/v1/locality", routes.locality),
        ("POST", "/v1/score", routes.score),
        ("POST", "/v1/candidates", routes.candidates),
        ("GET", "/v1/pods", routes.pods),
        ("POST", "/score_completions", routes.score_completions),
        ("POST", "/score_chat_completions", routes.score_chat_completions),
        ("GET", "/healthz", routes.health),
        ("GET", "/readyz", routes.ready),
        ("GET", "/metrics", routes.metrics),
    ]
    if routing is not None:
        endpoints += [("GET", "/v1/decisions", routing.decisions), ("GET", "/v1/endpoints", routing.endpoints)]
        endpoints += [("POST", "/v1/preview", routing.preview)]
    if dashboard is not None:
        endpoints += [("GET", "/v1/dashboard", dashboard.dashboard)]
    for method, path, endpoint in endpoints:
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_model=None,
            operation_id=endpoint.__name__,
            openapi_extra=OPERATIONS[endpoint.__name__],
        )
    pages: dict[str, Callable[..., object]] = {}
    if dashboard is not None:
        pages = {"/": dashboard.home, **dict.fromkeys(FILES, dashboard.file)}
    for path, page in pages.items():
        app.add_api_route(path, page, methods=["GET"], response_model=None, include_in_schema=False)
    install_components(app, token_needed=api.token is not None)
    add_fault_handlers(app)
    open_paths = {*_OPEN_PATHS, *pages, *(("/metrics",) if api.metrics_open else ())}
    paths = {path for _, path, _ in endpoints} | {*_OPEN_PATHS, *pages}
    app.add_middleware(Edge, api=api, metrics=indexer.metrics, routes=paths, open_paths=open_paths)
    return app


class _Routes:
    """One method a route. Docstrings are shown in the API's documentation."""

    def __init__(self, indexer: ServedIndex, prompts: Prompts, gate: Gate) -> None:
        self._indexer = indexer
        self._prompts = prompts
        self._limits = indexer.config.api
        self._gate = gate
        self._scrape = asyncio.Lock()

    async def score(self, request: Request) -> Response:
        """Score all pods, or the named ones, for a prompt: best first."""
        return await self._query(request, self._score)

    async def candidates(self, request: Request) -> Response:
        """Find the pods that hold a prefix of a prompt: best first."""
        return await self._query(request, self._candidates)

    async def locality(self, request: Request) -> Response:
        """Say where blocks lie, by block key or by prompt."""
        return await self._query(request, lambda body: self._locate(read_body(body, LocalityBody)))

    async def locality_by_url(self, request: Request) -> Response:
        """Say where blocks lie. For more keys or tokens than fit into a URL, use POST."""
        with self._gate.admit() as slot:
            body = _locality_from_url(request)
            answer = await self._prompts.answer(slot, lambda: _encoded(self._locate(body)))
        return Response(answer, media_type=JSON)

    async def score_completions(self, request: Request) -> Response:
        """Score pods for a completion request. As in llm-d's example: the answer is an object of pod to score."""
        return await self._query(request, self._score_completion)

    async def score_chat_completions(self, request: Request) -> Response:
        """Score pods for a chat completion request. As in llm-d's example: the answer is an object of pod to score."""
        return await self._query(request, self._score_chat_completion)

    async def pods(self, request: Request) -> Response:
        """Show every event stream: is it fresh, how much does it hold, how far behind is it."""
        known_parameters(request.query_params, frozenset())
        with self._gate.admit() as slot:
            answer = await slot.run(lambda: msgspec.json.encode(PodsAnswer(tuple(self._indexer.pods()))))
        return Response(answer, media_type=JSON)

    async def health(self) -> Response:
        """Whether the process serves at all. Needs no token."""
        return Response(msgspec.json.encode(HealthAnswer("ok")), media_type=JSON)

    async def ready(self, request: Request) -> Response:
        """Whether answers can be relied on. Needs no token; the reason is only shown with it."""
        ready, reason = (False, "the service is stopping") if self._gate.draining else self._indexer.ready()
        if ready:
            ready, reason = self._prompts.ready()
        if ready:
            return Response(msgspec.json.encode(HealthAnswer("ready")), media_type=JSON)
        shown = reason if request.state.authorized else None
        return Response(msgspec.json.encode(HealthAnswer("not ready", shown)), 503, {"Retry-After": "1"}, JSON)

    async def metrics(self) -> Response:
        """Metrics in the Prometheus text format."""
        async with self._scrape:  # one at a time: a scrape walks all pods
            text = await asyncio.to_thread(self._indexer.metrics.render)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def _query(self, request: Request, read: Callable[[bytes], Question[Answer]]) -> Response:
        """Read the body within bounds; decode it, ask the index and encode in a thread."""
        known_parameters(request.query_params, frozenset())
        with self._gate.admit() as slot:
            try:
                body = await read_bytes(request, self._limits.body_bytes_max)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            encoded = await self._prompts.answer(slot, lambda: _encoded(read(body)))
        return Response(encoded, media_type=JSON)

    def _score(self, body: bytes) -> Question[Answer]:
        def answer(told: ToldPrompt) -> Answer:
            return msgspec.structs.replace(self._indexer.score(told.query), tokens=told.tokens)

        return Question(asked_prompt(self._limits, read_body(body, ScoreBody)), answer)

    def _candidates(self, body: bytes) -> Question[Answer]:
        asked = read_body(body, CandidatesBody)

        def answer(told: ToldPrompt) -> Answer:
            return CandidatesAnswer(self._indexer.candidates(told.query, asked.limit), told.tokens)

        return Question(asked_prompt(self._limits, asked), answer)

    def _score_completion(self, body: bytes) -> Question[Answer]:
        return Question(asked_completion(self._limits, read_body(body, LlmdCompletionBody)), self._scores_by_pod)

    def _score_chat_completion(self, body: bytes) -> Question[Answer]:
        return Question(asked_chat_completion(self._limits, read_body(body, LlmdChatBody)), self._scores_by_pod)

    def _scores_by_pod(self, told: ToldPrompt) -> Answer:
        return {pod.pod: pod.score for pod in self._indexer.candidates(told.query)}

    def _locate(self, asked: LocalityBody) -> Question[Answer]:
        if asked.keys is None:
            if not has_prompt(asked):
                raise RequestError("keys", "is missing", "send block keys, or a prompt and model")
            return Question(asked_prompt(self._limits, asked), lambda told: self._located(asked, self._keys_of(told), told))
        if has_prompt(asked):
            raise RequestError("keys", "a prompt is given too", "send one of the two")
        keys = checked_keys(self._limits, asked.keys)
        return Question(NO_PROMPT, lambda told: self._located(asked, keys, told))

    def _keys_of(self, told: ToldPrompt) -> list[BlockKey]:
        return self._indexer.block_keys(told.query)

    def _located(self, asked: LocalityBody, keys: list[BlockKey], told: ToldPrompt) -> LocalityAnswer:
        pods = None if asked.pods is None else frozenset(map(PodId, asked.pods))
        found = self._indexer.locality(keys, pods)
        blocks = tuple(BlockAnswer(key_text(block.key), block.holders) for block in found)
        return LocalityAnswer(blocks, self._indexer.config.keys.block_size, told.tokens)


def _encoded(question: Question[Answer]) -> Question[bytes]:
    return Question(question.asked, lambda told: msgspec.json.encode(question.answer(told)))


def _locality_from_url(request: Request) -> LocalityBody:
    names = frozenset({"keys", "token_ids", "text", "model", "lora_name", "cache_salt", "pods"})
    known_parameters(request.query_params, names)
    given = {name: ",".join(request.query_params.getlist(name)) for name in names if name in request.query_params}
    lists = {name: _split(given[name]) for name in ("keys", "pods") if name in given}
    tokens = {"token_ids": [_token(text) for text in _split(given["token_ids"])]} if "token_ids" in given else {}
    single = {name: given[name] for name in ("text", "model", "lora_name", "cache_salt") if name in given}
    return LocalityBody(**lists, **tokens, **single)  # type: ignore[arg-type]  # names and types are those above


def _split(text: str) -> list[str]:
    return [part for part in (part.strip() for part in text.split(",")) if part]


def _token(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise RequestError("token_ids", f"{text!r:.40} is not a token id", "give integers with commas between them")
    return int(text)
