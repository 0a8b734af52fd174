"""GET /v1/models: what all engines together serve, kept for a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.serve.proxy.call import Stack
from kvatlas.serve.proxy.errors import ProxyError, UpstreamError

ENGINES_AT_ONCE_MAX = 16
ANSWER_BYTES_MAX = 4 << 20
ANSWER_S_MAX = 5.0
PATH = "/v1/models"


class ModelList(msgspec.Struct, frozen=True):
    """As OpenAI's API has it. Models keep every field that engines give them."""

    data: tuple[dict[str, Any], ...]
    object: str = "list"


class Models:
    """Asks every engine once in ``ttl_s``, and merges what they say: of equal ids the first one stays."""

    def __init__(
        self,
        stack: Stack,
        endpoints: Callable[[], Sequence[Endpoint]],
        healthy: Callable[[EndpointName], bool],
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stack = stack
        self._endpoints = endpoints
        self._healthy = healthy
        self._ttl_s = ttl_s
        self._clock = clock
        self._asking = asyncio.Lock()
        self._kept: tuple[float, ModelList] | None = None

    async def get(self, headers: Mapping[str, str], *, keep: bool) -> ModelList:
        """Return the models. ``headers``: for engines; ``keep`` False: they may be told only to who sends such headers.

        Raises ProxyError where no engine answers.
        """
        if not keep:
            return await self._ask(headers)
        async with self._asking:
            if self._kept is None or self._clock() - self._kept[0] >= self._ttl_s:
                self._kept = (self._clock(), await self._ask(headers))
            return self._kept[1]

    async def _ask(self, headers: Mapping[str, str]) -> ModelList:
        by_url = {endpoint.url: endpoint for endpoint in self._endpoints() if self._healthy(endpoint.name)}
        turns = asyncio.Semaphore(ENGINES_AT_ONCE_MAX)
        answers = await asyncio.gather(*(self._ask_one(endpoint, headers, turns) for endpoint in by_url.values()))
        told = [answer for answer in answers if answer is not None]
        if not told:
            problem = "no engine tells its models" if by_url else "no engine is there"
            raise ProxyError(503, problem, "see GET /v1/endpoints for who is there", reason="rejected-no-endpoints")
        merged: dict[str, dict[str, Any]] = {}
        for answer in told:
            for model in answer.data:
                merged.setdefault(str(model.get("id")), model)
        return ModelList(tuple(merged.values()))

    async def _ask_one(self, endpoint: Endpoint, headers: Mapping[str, str], turns: asyncio.Semaphore) -> ModelList | None:
        async with turns:
            try:
                async with asyncio.timeout(ANSWER_S_MAX):
                    status, body = await self._stack.fetch(endpoint, PATH, headers, ANSWER_BYTES_MAX)
                return msgspec.json.decode(body, type=ModelList) if status == 200 else None
            except (TimeoutError, UpstreamError, msgspec.MsgspecError):
                return None
