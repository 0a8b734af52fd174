"""A query's prompt, in whichever form it comes: token ids are taken as they are, text and chats become tokens first.

Nothing here knows a protocol. Requests are read and answered in a query's thread, tokenized in the tokenizer's threads; the
event loop only waits.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Container, Mapping
from typing import Generic, Literal, NamedTuple, TypeVar

import msgspec

from kvatlas.config import ApiSettings, Config
from kvatlas.errors import RequestError, TokenizationError
from kvatlas.observe.metrics import Metrics
from kvatlas.results import Query, TokensFailure, TokensInfo
from kvatlas.serve.gate import Slot
from kvatlas.serve.queries import checked_tokens, make_query
from kvatlas.serve.schema import ChatBody, CompletionBody, LlmdChatBody, LlmdCompletionBody, PromptBody, ScoreBody, TokenizeBody
from kvatlas.tokens.pending import PendingTokens
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt, Truncation
from kvatlas.tokens.results import Tokenized
from kvatlas.tokens.tokenization import Policy, Tokenization, Waiting, estimate
from kvatlas.types import MultimodalItem

T = TypeVar("T")


_PROMPT_FIELDS = frozenset((*ChatPrompt.__struct_fields__, *TextPrompt.__struct_fields__)) - {"model"} | {
    *("prompt", "truncate_prompt_tokens", "truncation_side", "max_tokens"),
}


class AskedPrompt(msgspec.Struct, frozen=True):
    """A query whose prompt may have to be tokenized first."""

    query: Query
    """With the prompt's tokens, where ``prompt`` is None."""
    prompt: Prompt | None = None
    tokenize: TokenizeBody = TokenizeBody()
    place: str = ""
    """Where the prompt stands in the request: ``chat.``, ``completion.``, or ``text``, which is all of it."""


class ToldPrompt(msgspec.Struct, frozen=True):
    """A query with its tokens."""

    query: Query
    tokens: TokensInfo | None
    """None where the token ids were given."""


class Question(NamedTuple, Generic[T]):
    """What a request asks, and how to answer it once its tokens are there."""

    asked: AskedPrompt
    answer: Callable[[ToldPrompt], T]


class Prompts:
    """Turns requests into queries with tokens, and answers them."""

    def __init__(self, config: Config, tokenization: Tokenization, metrics: Metrics) -> None:
        self._api = config.api
        self._settings = config.tokens
        self._aliases = config.models
        self._tokenization = tokenization
        self._metrics = metrics

    @property
    def can_tokenize(self) -> bool:
        """Whether any tokenizer is configured."""
        return self._tokenization.configured

    def ready(self) -> tuple[bool, str]:
        """Return whether the tokenizers that were to be loaded are, and why not."""
        return self._tokenization.ready()

    async def answer(self, slot: Slot, read: Callable[[], Question[T]]) -> T:
        """Read a request and answer it, both in a thread of ``slot``. Raises what they raise, and TokenizationError."""

        def begin() -> T | _Begun[T]:
            question = read()
            asked = question.asked
            if asked.prompt is None:
                return question.answer(ToldPrompt(asked.query, None))
            try:
                prompt = named(asked.prompt, self._settings.models, self._aliases)
                return _Begun(question, self._tokenization.ask(prompt, self._waiting(asked.tokenize)))
            except TokenizationError as error:
                return _Begun(question, error)

        begun = await slot.run(begin)
        if not isinstance(begun, _Begun):
            return begun
        tokens = await _tokens(begun.pending)
        return await slot.run(lambda: begun.question.answer(self._told(begun.question.asked, tokens)))

    def _waiting(self, asked: TokenizeBody) -> Waiting:
        settings = self._settings
        budget_s = settings.budget if asked.budget_ms is None else asked.budget_ms / 1e3
        return Waiting(Policy(asked.policy or settings.policy), budget_s, settings.timeout)

    def _told(self, asked: AskedPrompt, tokens: Tokenized | TokenizationError) -> ToldPrompt:
        """Return the query with its tokens, or without any where that is asked for. Raises TokenizationError otherwise."""
        if isinstance(tokens, TokenizationError):
            if asked.tokenize.on_failure == "error":
                raise _in_place(asked.place, tokens)
            return self._untold(asked, tokens)
        token_ids = checked_tokens(self._api, tokens.token_ids)
        query = msgspec.structs.replace(asked.query, token_ids=token_ids, multimodal=tokens.multimodal)
        info = TokensInfo(
            source=tokens.source.value,
            tokenizer=tokens.tokenizer,
            revision=tokens.revision,
            exact=True,
            complete=tokens.complete,
            count=len(token_ids),
            from_store=tokens.tokens_stored,
        )
        return ToldPrompt(query, info)

    def _untold(self, asked: AskedPrompt, error: TokenizationError) -> ToldPrompt:
        assert asked.prompt is not None
        self._metrics.unscored(error.reason.value)
        info = TokensInfo(
            source="none",
            tokenizer=None,
            revision=None,
            exact=False,
            complete=False,
            count=0,
            from_store=0,
            failure=TokensFailure(error.reason.value, _field(asked.place, error.field), error.problem, error.remedy),
            estimated_count=estimate(asked.prompt).tokens,
        )
        return ToldPrompt(msgspec.structs.replace(asked.query, token_ids=array("I"), multimodal=()), info)


def named(prompt: Prompt, tokenizers: Container[str], aliases: Mapping[str, str]) -> Prompt:
    """Return a prompt for the tokenizer of its model, whose alias it may have."""
    if prompt.model in tokenizers or prompt.model not in aliases:
        return prompt
    return msgspec.structs.replace(prompt, model=aliases[prompt.model])


class _Begun(Generic[T]):
    def __init__(self, question: Question[T], pending: PendingTokens | TokenizationError) -> None:
        self.question = question
        self.pending = pending


async def _tokens(pending: PendingTokens | TokenizationError) -> Tokenized | TokenizationError:
    if isinstance(pending, TokenizationError):
        return pending
    try:
        return await pending.wait()
    except TokenizationError as error:
        return error


def _in_place(place: str, error: TokenizationError) -> TokenizationError:
    """Name the field as it stands in the request. A new error: the old one may be shared by equal requests."""
    return TokenizationError(error.reason, _field(place, error.field), error.problem, error.remedy)


def _field(place: str, field: str) -> str:
    """Return a prompt's field as it is called in the request; what is no part of the prompt keeps its name."""
    if not place or re.split(r"[.\[]", field, maxsplit=1)[0] not in _PROMPT_FIELDS:
        return field
    if not place.endswith("."):
        return place
    return place.removesuffix(".") if field == "prompt" and place != "completion." else f"{place}{field}"


NO_PROMPT = AskedPrompt(Query((), ""))
"""What is asked where a query has no prompt."""

_FORMS = ("token_ids", "text", "completion", "chat")


def has_prompt(body: PromptBody) -> bool:
    """Tell whether a body holds a prompt in any form."""
    return any(getattr(body, name) is not None for name in _FORMS)


def asked_prompt(limits: ApiSettings, body: PromptBody) -> AskedPrompt:
    """Return what a body asks. Raises RequestError where it has no prompt, or two."""
    given = [name for name in _FORMS if getattr(body, name) is not None]
    if not given:
        raise RequestError("token_ids", "is missing", "send token_ids, text, completion or chat")
    if len(given) > 1:
        raise RequestError(given[1], f"{given[0]} is given too", "send one of the two")
    prompt, place = _prompt_of(body)
    if prompt is not None and body.multimodal:
        raise RequestError("multimodal", f"{given[0]} is given, whose items are found", "leave it out, or send token_ids")
    token_ids = body.completion.prompt if body.completion and prompt is None else body.token_ids
    query = make_query(
        limits,
        token_ids=token_ids if isinstance(token_ids, list) else [],
        model=body.model,
        lora_name=body.lora_name,
        cache_salt=_salt_of(body),
        multimodal=[MultimodalItem(item.hash, item.offset_tokens, item.length_tokens) for item in body.multimodal],
        pods=body.pods,
        scorer=body.scorer if isinstance(body, ScoreBody) else None,
    )
    return AskedPrompt(query, prompt, body.tokenize, place)


def _prompt_of(body: PromptBody) -> tuple[Prompt | None, str]:
    """Return what has to be tokenized, and the field that holds it."""
    if body.text is not None:
        return TextPrompt(model=body.model, text=body.text), "text"
    if body.chat is not None:
        return chat_prompt(body.model, body.chat), "chat."
    if body.completion is not None and isinstance(body.completion.prompt, str):
        return text_prompt(body.model, body.completion.prompt, body.completion), "completion."
    if body.completion is not None and body.completion.truncate_prompt_tokens is not None:
        remedy = "send the token ids that are left of it"
        raise RequestError("completion.truncate_prompt_tokens", "token ids are given", remedy)
    return None, ""


def _salt_of(body: PromptBody) -> str | None:
    inner = body.chat.cache_salt if body.chat else body.completion.cache_salt if body.completion else None
    if inner is not None and body.cache_salt is not None and inner != body.cache_salt:
        raise RequestError("cache_salt", "another one is in the request itself", "send one of the two")
    return body.cache_salt if inner is None else inner


def text_prompt(model: str, text: str, body: CompletionBody) -> TextPrompt:
    """Return the prompt of a completion request."""
    return TextPrompt(
        model=model,
        text=text,
        add_special_tokens=body.add_special_tokens,
        truncation=_truncation(body.truncate_prompt_tokens, body.truncation_side),
        max_output_tokens=body.max_tokens or 0,
    )


def _truncation(tokens: int | None, side: Literal["left", "right"] | None) -> Truncation | None:
    return None if tokens is None else Truncation(tokens, side)


def chat_prompt(model: str, body: ChatBody | LlmdChatBody) -> ChatPrompt:
    """Return the prompt of a chat completion request. Raises RequestError where it has no messages."""
    messages = body.messages
    if isinstance(body, LlmdChatBody) and messages is None:
        messages = body.conversation
    if messages is None:
        raise RequestError("messages", "is missing", "send a chat completion request")
    return ChatPrompt(
        model=model,
        messages=messages,
        tools=body.tools,
        tool_choice=body.tool_choice,
        documents=body.documents,
        chat_template=body.chat_template or None,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        reasoning_effort=body.reasoning_effort,
        truncation=_truncation(body.truncate_prompt_tokens, body.truncation_side),
        max_output_tokens=body.max_completion_tokens or body.max_tokens or 0,
    )


def asked_completion(limits: ApiSettings, body: LlmdCompletionBody) -> AskedPrompt:
    """Return what llm-d's /score_completions asks."""
    query = make_query(limits, token_ids=[], model=body.model, cache_salt=body.cache_salt)
    return AskedPrompt(query, text_prompt(body.model, body.prompt, body))


def asked_chat_completion(limits: ApiSettings, body: LlmdChatBody) -> AskedPrompt:
    """Return what llm-d's /score_chat_completions asks."""
    query = make_query(limits, token_ids=[], model=body.model, cache_salt=body.cache_salt)
    return AskedPrompt(query, chat_prompt(body.model, body))
