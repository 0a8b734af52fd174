"""Prompts that an event loop has tokenized by threads of the native core."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("kvatlas._native")

from kvatlas.config import load_config
from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.mail import Mail
from kvatlas.observe.metrics import Metrics
from kvatlas.tokens.local.backend import NativeWork
from kvatlas.tokens.native_threads import NativeThreads
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt, Truncation
from kvatlas.tokens.setup import make_tokenization
from kvatlas.tokens.tokenization import Tokenization
from tests.models.chats import DATA

WORDS = " ".join(f"Sentence {number} says that prefixes are known, naïvely or not." for number in range(60))


def text(of: str, **more: Any) -> TextPrompt:
    return TextPrompt(model="m", text=of, **more)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def tokenization(metrics: Metrics) -> Iterator[Tokenization]:
    chosen = {
        "tokens.models.m": DATA / "tinymodel",
        "tokens.maxModelLen.m": 4_000,
        "tokens.workers": 1,
        "tokens.queueMax": 2,
    }
    settings = load_config(environ={}, overrides=[f"{name}={value}" for name, value in chosen.items()]).tokens
    made = make_tokenization(settings, metrics)
    made.tokenize(text("loads"))
    yield made
    made.close()


class Silent:
    """Threads that never answer."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def submit(self, _encoder: Any, text: str, _mailbox: Any, _ticket: int) -> None:
        self.asked.append(text)

    def close(self) -> None: ...


@pytest.mark.parametrize(
    "prompt",
    [
        text(WORDS),
        text("short", add_special_tokens=False),
        text(WORDS, truncation=Truncation(tokens=5)),
        ChatPrompt(model="m", messages=[{"role": "user", "content": WORDS}]),
    ],
    ids=["text", "short", "truncated", "chat"],
)
async def test_tokens_are_those_that_a_thread_of_python_makes(tokenization: Tokenization, prompt: Prompt) -> None:
    right = tokenization.tokenize(prompt).token_ids
    assert (await tokenization.tokens(prompt)).token_ids == right
    again = await tokenization.tokens(prompt)
    assert again.token_ids == right
    assert again.tokenizer == "tinymodel"


async def test_what_was_known_is_counted(tokenization: Tokenization, metrics: Metrics) -> None:
    await tokenization.tokens(text(WORDS))
    told = await tokenization.tokens(text(WORDS + " and more"))
    assert 0 < told.tokens_stored < len(told.token_ids)
    assert f'kv_cache_prompt_tokens_total{{how="stored"}} {told.tokens_stored}.0'.encode() in metrics.render()
    assert tokenization.in_flight == 0


async def test_equal_prompts_in_flight_are_tokenized_once(tokenization: Tokenization) -> None:
    told = await asyncio.gather(*(tokenization.tokens(text(WORDS)) for _ in range(5)))
    assert {len(tokens.token_ids) for tokens in told} == {len(told[0].token_ids)}
    assert tokenization.shared == 4


async def test_more_prompts_than_may_wait_are_refused(tokenization: Tokenization, metrics: Metrics) -> None:
    told = await asyncio.gather(*(tokenization.tokens(text(f"{WORDS} {n}")) for n in range(4)), return_exceptions=True)
    refused = [error for error in told if isinstance(error, TokenizationError)]
    assert [error.reason for error in refused] == [TokenizationReason.BUSY]
    assert b'kv_cache_tokenization_failures_total{reason="busy"} 1.0' in metrics.render()


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        ("", TokenizationReason.BAD_TEXT),
        ("a\ud800b", TokenizationReason.BAD_TEXT),
        ("a b " * 4_000, TokenizationReason.TOO_MANY_TOKENS),
        ("a b " * 400_000, TokenizationReason.TOO_MANY_TOKENS),
    ],
    ids=["empty", "half of a pair", "too many tokens", "far too long"],
)
async def test_what_is_wrong_with_a_prompt_is_said_as_always(
    tokenization: Tokenization, metrics: Metrics, of: str, reason: TokenizationReason
) -> None:
    with pytest.raises(TokenizationError) as raised:
        await tokenization.tokens(text(of))
    assert raised.value.reason is reason
    assert f'kv_cache_tokenization_failures_total{{reason="{reason.value}"}} 1.0'.encode() in metrics.render()


def silent() -> tuple[Silent, NativeThreads]:
    from kvatlas import _native

    threads: Any = Silent()
    return threads, NativeThreads(threads, Mail(_native.Mailbox()), lambda _found, _seconds: None)


def work(tokenization: Tokenization, prompt: TextPrompt) -> NativeWork:
    assert tokenization.local is not None
    found = tokenization.local.native_work(prompt)
    assert found is not None
    return found


async def test_a_late_answer_is_not_waited_for_and_its_work_goes_on(tokenization: Tokenization) -> None:
    asked, threads = silent()
    prompt = text(WORDS)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await threads.tokens(prompt, work(tokenization, prompt), 0.01)
    assert asked.asked == [WORDS]
    assert threads.in_flight == 1
    threads.close()


async def test_who_waits_is_told_when_all_is_closed(tokenization: Tokenization) -> None:
    _, threads = silent()
    prompt = text(WORDS)
    waiting = asyncio.create_task(threads.tokens(prompt, work(tokenization, prompt), 60))
    await asyncio.sleep(0)
    threads.close()
    with pytest.raises(TokenizationError, match="closed"):
        await waiting


async def test_one_that_is_cancelled_leaves_the_others_their_tokens(tokenization: Tokenization) -> None:
    prompt = text(WORDS)
    first, second = (asyncio.create_task(tokenization.tokens(prompt)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).token_ids == tokenization.tokenize(prompt).token_ids
    with pytest.raises(asyncio.CancelledError):
        await first


def test_another_event_loop_is_served_by_python_threads(tokenization: Tokenization) -> None:
    tokens: list[array[int]] = []
    for _ in range(2):
        tokens.append(asyncio.run(tokenization.tokens(text(WORDS))).token_ids)
    assert tokens[0] == tokens[1]
