"""A real engine as a calibration sees it: an OpenAI endpoint that streams, and its metrics."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from kvatlas.discovery.engine_metrics import EngineMetricsError, read_figures
from kvatlas.errors import RequestError

REQUEST_S_MAX = 300.0
CONNECT_S_MAX = 5.0
LINE_BYTES_MAX = 1 << 20


class Answered(msgspec.Struct, frozen=True):
    """One request's answer. Times count from sending it."""

    sent_s: float
    """On the clock of time.perf_counter."""
    token_s: tuple[float, ...]
    """When each token came, on the same clock."""
    prompt_tokens: int | None
    cached_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s


class Cache(msgspec.Struct, frozen=True):
    """What an engine's metrics say of its KV cache; None where they do not."""

    block_size_tokens: int | None = None
    gpu_blocks: int | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class Endpoint:
    """An engine at ``url``. RequestError says what an engine does not do that is needed."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(REQUEST_S_MAX, connect=CONNECT_S_MAX)
        self._client = httpx.AsyncClient(timeout=timeout, headers=headers, trust_env=False, limits=httpx.Limits())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def model(self) -> tuple[str, int | None]:
        """Return the first model's name, and how many tokens it takes where that is told."""
        answer = await self._get("/v1/models")
        try:
            first = answer.json()["data"][0]
            limit = first.get("max_model_len")
            return str(first["id"]), limit if isinstance(limit, int) else None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise RequestError("URL", f"{self.url}/v1/models lists no model", "name an OpenAI-compatible engine") from None

    async def cache(self) -> Cache:
        """Return what the metrics page tells; nothing where there is none."""
        try:
            page = (await self._get("/metrics")).content
        except RequestError:
            return Cache()
        for engine in ("vllm", "sglang"):
            try:
                report = read_figures(page, engine).report(0.0)
            except EngineMetricsError:
                continue
            return Cache(report.block_size_tokens, report.gpu_blocks)
        return Cache()

    async def generate(self, model: str, prompt: list[int], output_tokens: int) -> Answered:
        """Send a prompt, and note when its tokens come."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        sent_s = time.perf_counter()
        times: list[float] = []
        usage = _Usage()
        try:
            async with self._client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise self._refused((await answer.aread()).decode("utf-8", "replace"), answer.status_code)
                async for line in answer.aiter_lines():
                    chunk = self._chunk(line)
                    if chunk is None:
                        continue
                    tokens = sum(1 if one.token_ids is None else len(one.token_ids) for one in chunk.choices)
                    times += [time.perf_counter()] * tokens
                    usage = chunk.usage or usage
        except httpx.HTTPError as error:
            raise RequestError("URL", f"{self.url} failed: {error!r}", "see that the engine runs") from error
        if not times:
            raise RequestError("URL", f"{self.url} answered without a token", "name an engine that streams completions")
        details = usage.prompt_tokens_details
        return Answered(sent_s, tuple(times), usage.prompt_tokens, (details and details.cached_tokens) or 0)

    def _chunk(self, line: str) -> _Chunk | None:
        if not line.startswith("data: ") or line == "data: [DONE]":
            return None
        try:
            chunk = msgspec.json.decode(line[6:], type=_Chunk)
        except msgspec.MsgspecError as error:
            raise RequestError(
                "URL", f"{self.url} streams something else: {error}", "name an OpenAI-compatible engine"
            ) from None
        if chunk.error is not None:
            raise self._refused(str(chunk.error), httpx.codes.OK)
        return chunk

    def _refused(self, text: str, status: int) -> RequestError:
        return RequestError("URL", f"{self.url} answered {status}: {text[:500]}", "see what the engine says")

    async def _get(self, path: str) -> httpx.Response:
        try:
            answer = await self._client.get(self.url + path)
        except httpx.HTTPError as error:
            raise RequestError("URL", f"{self.url} does not answer: {error!r}", "see that the engine runs") from error
        if answer.status_code != httpx.codes.OK:
            raise self._refused(answer.text, answer.status_code)
        return answer
