"""The gRPC services: indexer.v1 for llm-d's clients, kvatlas.v1 for ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import msgspec
from grpc.aio import ServicerContext

from kvatlas.errors import ConfigError, RequestError
from kvatlas.proto.indexer.v1 import indexer_pb2, indexer_pb2_grpc
from kvatlas.proto.kvatlas.v1 import kvatlas_pb2, kvatlas_pb2_grpc
from kvatlas.serve.grpc_calls import Calls
from kvatlas.serve.grpc_messages import (
    asked_of,
    asked_of_llmd,
    block_message,
    frame_of,
    pod_message,
    score_message,
    stream_message,
    tokens_message,
)
from kvatlas.serve.prompts import NO_PROMPT, Prompts, Question, ToldPrompt
from kvatlas.serve.queries import ServedIndex, checked_keys
from kvatlas.types import BlockKey, PodId

A = TypeVar("A")

REJECTIONS_MAX = 16
_RETRY_WAITS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class LlmdIndexer(indexer_pb2_grpc.IndexerServiceServicer):
    """indexer.v1.IndexerService."""

    def __init__(self, indexer: ServedIndex, prompts: Prompts, calls: Calls) -> None:
        self._indexer = indexer
        self._prompts = prompts
        self._calls = calls

    async def GetPodScores(  # noqa: N802  # the contract's name
        self, request: indexer_pb2.GetPodScoresRequest, context: ServicerContext[Any, Any]
    ) -> indexer_pb2.GetPodScoresResponse:
        def read() -> Question[indexer_pb2.GetPodScoresResponse]:
            asked = asked_of_llmd(self._indexer.config.api, request, text=self._prompts.can_tokenize)
            return Question(asked, answer)

        def answer(told: ToldPrompt) -> indexer_pb2.GetPodScoresResponse:
            found = self._indexer.candidates(told.query)
            scores = (indexer_pb2.PodScore(pod=pod.pod, score=pod.score) for pod in found)
            return indexer_pb2.GetPodScoresResponse(scores=scores)

        name = "indexer.v1.IndexerService/GetPodScores"
        return await self._calls.steps(name, context, lambda slot: self._prompts.answer(slot, read))


class KvAtlas(kvatlas_pb2_grpc.KvAtlasServicer):
    """kvatlas.v1.KvAtlas. Publishing has threads of its own: it waits for the write path, queries must not."""

    def __init__(self, indexer: ServedIndex, prompts: Prompts, calls: Calls) -> None:
        self._indexer = indexer
        self._prompts = prompts
        self._calls = calls
        self._limits = indexer.config.api
        self._publishing = ThreadPoolExecutor(4, thread_name_prefix="kvatlas-publish")

    def close(self) -> None:
        """Let go of the threads; return without waiting."""
        self._publishing.shutdown(wait=False, cancel_futures=True)

    async def Locality(  # noqa: N802
        self, request: kvatlas_pb2.LocalityRequest, context: ServicerContext[Any, Any]
    ) -> kvatlas_pb2.LocalityResponse:
        return await self._ask("Locality", context, lambda: self._locate(request))

    async def Score(  # noqa: N802
        self, request: kvatlas_pb2.ScoreRequest, context: ServicerContext[Any, Any]
    ) -> kvatlas_pb2.ScoreResponse:
        def answer(told: ToldPrompt) -> kvatlas_pb2.ScoreResponse:
            return score_message(msgspec.structs.replace(self._indexer.score(told.query), tokens=told.tokens))

        return await self._ask("Score", context, lambda: Question(asked_of(self._limits, request.prompt), answer))

    async def Candidates(  # noqa: N802
        self, request: kvatlas_pb2.CandidatesRequest, context: ServicerContext[Any, Any]
    ) -> kvatlas_pb2.CandidatesResponse:
        limit = request.limit if request.HasField("limit") else None

        def read() -> Question[kvatlas_pb2.CandidatesResponse]:
            if limit == 0:
                raise RequestError("limit", "is 0", "ask for at least 1, or leave it out for all")
            return Question(asked_of(self._limits, request.prompt), answer)

        def answer(told: ToldPrompt) -> kvatlas_pb2.CandidatesResponse:
            found = self._indexer.candidates(told.query, limit)
            return kvatlas_pb2.CandidatesResponse(pods=map(pod_message, found), tokens=tokens_message(told.tokens))

        return await self._ask("Candidates", context, read)

    async def _ask(self, method: str, context: ServicerContext[Any, Any], read: Callable[[], Question[A]]) -> A:
        return await self._calls.steps(f"kvatlas.v1.KvAtlas/{method}", context, lambda slot: self._prompts.answer(slot, read))

    async def Pods(  # noqa: N802
        self, request: kvatlas_pb2.PodsRequest, context: ServicerContext[Any, Any]
    ) -> kvatlas_pb2.PodsResponse:
        def work() -> kvatlas_pb2.PodsResponse:
            return kvatlas_pb2.PodsResponse(streams=map(stream_message, self._indexer.pods()))

        return await self._calls.answer("kvatlas.v1.KvAtlas/Pods", context, work)

    async def PublishEvents(  # noqa: N802
        self,
        request_iterator: AsyncIterator[kvatlas_pb2.PublishEventsRequest],
        context: ServicerContext[Any, Any],
    ) -> kvatlas_pb2.PublishEventsResponse:
        answer = kvatlas_pb2.PublishEventsResponse()
        # The requests end alike when the client is done and when it is gone: both count as OK.
        with self._calls.measured("kvatlas.v1.KvAtlas/PublishEvents"):
            async for request in request_iterator:
                try:
                    await self._publish(request)
                except (RequestError, ConfigError, TimeoutError) as error:
                    if answer.rejected < REJECTIONS_MAX:
                        position = answer.accepted + answer.rejected
                        answer.rejections.append(_rejection(position, error))
                    answer.rejected += 1
                else:
                    answer.accepted += 1
        return answer

    async def _publish(self, request: kvatlas_pb2.PublishEventsRequest) -> None:
        """Hand a frame to the index. While its queue is full the sender is held back; in the end it is refused."""
        take = partial(
            self._indexer.publish,
            frame_of(request),
            decoder=request.decoder or "vllm",
            pod=PodId(request.pod) if request.HasField("pod") else None,
            model=request.model if request.HasField("model") else None,
        )
        loop = asyncio.get_running_loop()
        for wait_s in _RETRY_WAITS_S:
            try:
                await loop.run_in_executor(self._publishing, take)
            except RequestError as error:
                if error.field != "frame":  # "frame": the queue is full, and nothing was taken
                    raise
                await asyncio.sleep(wait_s)
            else:
                return
        await loop.run_in_executor(self._publishing, take)

    def _locate(self, request: kvatlas_pb2.LocalityRequest) -> Question[kvatlas_pb2.LocalityResponse]:
        if request.keys and request.HasField("prompt"):
            raise RequestError("keys", "a prompt is given too", "send one of the two")
        if request.HasField("prompt"):
            asked = asked_of(self._limits, request.prompt)
            return Question(asked, lambda told: self._located(request, self._indexer.block_keys(told.query), told))
        if not request.keys:
            raise RequestError("keys", "is missing", "send block keys or a prompt")
        keys = checked_keys(self._limits, request.keys)
        return Question(NO_PROMPT, lambda told: self._located(request, keys, told))

    def _located(
        self, request: kvatlas_pb2.LocalityRequest, keys: list[BlockKey], told: ToldPrompt
    ) -> kvatlas_pb2.LocalityResponse:
        pods = frozenset(map(PodId, [*request.pods, *request.prompt.pods])) or None
        return kvatlas_pb2.LocalityResponse(
            blocks=map(block_message, self._indexer.locality(keys, pods)),
            block_size_tokens=self._indexer.config.keys.block_size,
            tokens=tokens_message(told.tokens),
        )


def _rejection(position: int, error: RequestError | ConfigError | TimeoutError) -> kvatlas_pb2.Rejection:
    if isinstance(error, RequestError):
        field, problem, remedy = error.field, error.problem, error.remedy
    elif isinstance(error, ConfigError):
        field, problem, remedy = error.path, error.problem, f"one of: {error.allowed}"
    else:
        field, problem, remedy = "frame", "was not taken in time", "send it again, later"
    return kvatlas_pb2.Rejection(position=position, field=field, problem=problem, remedy=remedy)
