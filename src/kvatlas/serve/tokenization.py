"""tokenization.TokenizationService: prompts become tokens here, for llm-d's clients and for other kvatlas services."""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Callable
from typing import Any, Protocol

import grpc
from grpc.aio import ServicerContext

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.proto.tokenization import tokenizer_pb2 as pb
from kvatlas.proto.tokenization import tokenizer_pb2_grpc
from kvatlas.serve.gate import Slot
from kvatlas.serve.grpc_calls import Calls
from kvatlas.serve.tokenization_messages import (
    chat_prompt,
    completion_prompt,
    features_message,
    offset_pairs,
    template_prompt,
    text_prompt,
)
from kvatlas.tokens.encoding import LocalTokenizer
from kvatlas.tokens.prompts import Prompt, TextPrompt
from kvatlas.tokens.results import Tokenized
from kvatlas.tokens.tokenization import Policy, Waiting

SERVICE = "tokenization.TokenizationService"


class Pending(Protocol):
    """Tokens to come."""

    async def wait(self) -> Tokenized: ...


class AskedTokenization(Protocol):
    """What the service needs of :class:`kvatlas.tokens.tokenization.Tokenization`."""

    def ask(self, prompt: Prompt, waiting: Waiting | None = None) -> Pending: ...


LoadTokenizer = Callable[[str], LocalTokenizer]
"""Returns a model's tokenizer, and loads it where it is not loaded yet. Raises TokenizationError."""


def add_tokenization(
    server: grpc.aio.Server, tokens: AskedTokenization, load: LoadTokenizer | None, calls: Calls, timeout_s: float
) -> None:
    """Let a server answer for tokenization.TokenizationService.

    ``load``: of this process's tokenizers; None where there are none, which leaves texts of chats and offsets unanswered.
    ``timeout_s``: the longest wait for tokens.
    """
    servicer = TokenizationServicer(tokens, load, calls, timeout_s)
    tokenizer_pb2_grpc.add_TokenizationServiceServicer_to_server(servicer, server)


class TokenizationServicer(tokenizer_pb2_grpc.TokenizationServiceServicer):
    """Answers with all of a prompt's tokens, whatever tokens.policy says; failures are status codes."""

    def __init__(self, tokens: AskedTokenization, load: LoadTokenizer | None, calls: Calls, timeout_s: float) -> None:
        self._tokens = tokens
        self._load = load
        self._calls = calls
        self._waiting = Waiting(Policy.EXACT, timeout_s=timeout_s)

    async def Tokenize(  # noqa: N802  # the contract's name
        self, request: pb.TokenizeRequest, context: ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        async def work(slot: Slot) -> pb.TokenizeResponse:
            placed = await slot.run(lambda: self._placed(text_prompt(request)))
            if placed is not None:
                return pb.TokenizeResponse(input_ids=placed[0], offset_pairs=placed[1], success=True)
            tokens = await self._ask(slot, lambda: text_prompt(request))
            return pb.TokenizeResponse(input_ids=tokens.token_ids, success=True)

        return await self._calls.steps(f"{SERVICE}/Tokenize", context, work)

    async def RenderChatTemplate(  # noqa: N802
        self, request: pb.ChatTemplateRequest, context: ServicerContext[Any, Any]
    ) -> pb.ChatTemplateResponse:
        def work() -> pb.ChatTemplateResponse:
            chat = template_prompt(request)
            tokenizer = self._loaded(chat.model)
            if tokenizer.text is None:
                raise TokenizationError(
                    TokenizationReason.UNSUPPORTED,
                    "model_name",
                    "its chats become tokens in one step",
                    "call RenderChatCompletion",
                )
            return pb.ChatTemplateResponse(rendered_prompt=tokenizer.render(chat), success=True)

        return await self._calls.answer(f"{SERVICE}/RenderChatTemplate", context, work)

    async def InitializeTokenizer(  # noqa: N802
        self, request: pb.InitializeTokenizerRequest, context: ServicerContext[Any, Any]
    ) -> pb.InitializeTokenizerResponse:
        def work() -> pb.InitializeTokenizerResponse:
            if self._load is not None:  # else nothing here needs to be loaded
                self._load(request.model_name)
            return pb.InitializeTokenizerResponse(success=True)

        return await self._calls.answer(f"{SERVICE}/InitializeTokenizer", context, work)

    async def RenderChatCompletion(  # noqa: N802
        self, request: pb.RenderChatCompletionRequest, context: ServicerContext[Any, Any]
    ) -> pb.RenderChatCompletionResponse:
        async def work(slot: Slot) -> pb.RenderChatCompletionResponse:
            tokens = await self._ask(slot, lambda: chat_prompt(request))
            return pb.RenderChatCompletionResponse(
                request_id=_new_id("chatcmpl"), token_ids=tokens.token_ids, features=features_message(tokens), success=True
            )

        return await self._calls.steps(f"{SERVICE}/RenderChatCompletion", context, work)

    async def RenderCompletion(  # noqa: N802
        self, request: pb.RenderCompletionRequest, context: ServicerContext[Any, Any]
    ) -> pb.RenderCompletionResponse:
        async def work(slot: Slot) -> pb.RenderCompletionResponse:
            tokens = await self._ask(slot, lambda: completion_prompt(request))
            return pb.RenderCompletionResponse(request_id=_new_id("cmpl"), token_ids=tokens.token_ids, success=True)

        return await self._calls.steps(f"{SERVICE}/RenderCompletion", context, work)

    async def _ask(self, slot: Slot, read: Callable[[], Prompt]) -> Tokenized:
        """Return all tokens of a prompt. It is read in a thread; the event loop only waits."""
        pending = await slot.run(lambda: self._tokens.ask(read(), self._waiting))
        tokens = await pending.wait()
        assert tokens.complete, "asked for all tokens"
        return tokens

    def _placed(self, prompt: TextPrompt) -> tuple[array[int], list[int]] | None:
        """Return a text's tokens with their places in it; None where they are not told here."""
        if self._load is None:
            return None
        tokenizer = self._load(prompt.model).text
        if tokenizer is None:
            return None
        found = tokenizer.encode(prompt.text)
        if not prompt.add_special_tokens:
            return found.token_ids, offset_pairs(0, found.ends, 0)
        pairs = offset_pairs(len(tokenizer.before), found.ends, len(tokenizer.after))
        return tokenizer.before + found.token_ids + tokenizer.after, pairs

    def _loaded(self, model: str) -> LocalTokenizer:
        if self._load is None:
            raise TokenizationError(
                TokenizationReason.UNSUPPORTED, "model_name", "there are no tokenizers here", "call RenderChatCompletion"
            )
        return self._load(model)


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
