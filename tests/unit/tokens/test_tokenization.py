"""Which backend tells a prompt's tokens, how long a request waits for them, and what becomes of failures."""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence

import pytest

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.observe.metrics import Metrics
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt
from kvatlas.tokens.results import Backend, Tokenized, TokenSource
from kvatlas.tokens.tokenization import Policy, Tokenization, Waiting, estimate

TEXT = TextPrompt(model="m", text="hello")


class Letters:
    """A backend that makes a token of each letter, when ``go`` is set."""

    def __init__(self, failure: TokenizationReason | None = None) -> None:
        self.failure = failure
        self.calls = 0
        self.go = threading.Event()
        self.go.set()

    def tokenize(self, prompt: Prompt, timeout_s: float) -> Tokenized:
        self.calls += 1
        self.go.wait(10)
        if self.failure is not None:
            raise TokenizationError(self.failure, "prompt", f"fails: {self.failure.value}", "nothing helps")
        assert isinstance(prompt, TextPrompt)
        return Tokenized(token_ids=array("I", map(ord, prompt.text)), source=TokenSource.LOCAL, tokenizer="letters")

    def close(self) -> None: ...


Make = Callable[[Sequence[Backend]], Tokenization]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def make(metrics: Metrics) -> Iterator[Make]:
    made: list[Tokenization] = []

    def over(backends: Sequence[Backend]) -> Tokenization:
        made.append(Tokenization(backends, metrics, workers=2, queue_max=2))
        return made[-1]

    yield over
    for tokenization in made:
        tokenization.close()


def test_the_first_backend_that_can_tell_tells(make: Make) -> None:
    first, second = Letters(), Letters()
    assert list(make([first, second]).tokenize(TEXT).token_ids) == list(map(ord, "hello"))
    assert (first.calls, second.calls) == (1, 0)


@pytest.mark.parametrize("reason", [reason for reason in TokenizationReason if reason.of_backend])
def test_a_backend_that_cannot_tell_leaves_it_to_the_next(make: Make, reason: TokenizationReason) -> None:
    assert len(make([Letters(reason), Letters()]).tokenize(TEXT).token_ids) == 5


@pytest.mark.parametrize("reason", [reason for reason in TokenizationReason if not reason.of_backend])
def test_a_prompt_that_is_wrong_is_wrong_everywhere(make: Make, reason: TokenizationReason) -> None:
    second = Letters()
    with pytest.raises(TokenizationError, match=reason.value):
        make([Letters(reason), second]).tokenize(TEXT)
    assert second.calls == 0


def test_what_helps_most_is_told_where_all_fail(make: Make) -> None:
    with pytest.raises(TokenizationError, match="timeout"):
        make([Letters(TokenizationReason.TIMEOUT), Letters(TokenizationReason.UNKNOWN_MODEL)]).tokenize(TEXT)
    with pytest.raises(TokenizationError, match="no tokenizer is configured"):
        make([]).tokenize(TEXT)


def test_failures_are_counted_by_reason(make: Make, metrics: Metrics) -> None:
    with pytest.raises(TokenizationError):
        make([Letters(TokenizationReason.BAD_TEXT)]).tokenize(TEXT)
    assert b'kv_cache_tokenization_failures_total{reason="bad_text"} 1.0' in metrics.render()


def test_a_late_answer_is_a_failure_and_the_work_goes_on(make: Make, metrics: Metrics) -> None:
    backend = Letters()
    backend.go.clear()
    tokenization = make([backend])
    with pytest.raises(TokenizationError) as raised:
        tokenization.tokenize(TEXT, Waiting(timeout_s=0.02))
    assert raised.value.reason is TokenizationReason.TIMEOUT
    assert tokenization.in_flight == 1
    backend.go.set()
    assert len(tokenization.tokenize(TEXT).token_ids) == 5


def test_equal_prompts_in_flight_are_tokenized_once(make: Make) -> None:
    backend = Letters()
    backend.go.clear()
    tokenization = make([backend])
    chat = ChatPrompt(model="m", messages=[{"role": "user", "content": "hi"}])
    pending = [tokenization.ask(TextPrompt(model="m", text="hello")) for _ in range(5)]
    tokenization.ask(chat)
    tokenization.ask(ChatPrompt(model="m", messages=[{"content": "hi", "role": "user"}]))  # another order: another prompt
    backend.go.set()
    assert {len(tokens.result().token_ids) for tokens in pending} == {5}
    assert tokenization.shared == 4


async def test_waiting_does_not_hold_the_event_loop(make: Make) -> None:
    backend = Letters()
    backend.go.clear()
    waiting = asyncio.create_task(make([backend]).ask(TEXT).wait())
    for _ in range(3):
        await asyncio.sleep(0.005)
    assert not waiting.done()
    backend.go.set()
    assert len((await waiting).token_ids) == 5


async def test_one_that_gives_up_does_not_end_the_work_of_another(make: Make) -> None:
    backend = Letters()
    backend.go.clear()
    tokenization = make([backend])
    first = asyncio.create_task(tokenization.ask(TEXT).wait())
    second = asyncio.create_task(tokenization.ask(TEXT).wait())
    await asyncio.sleep(0.01)
    first.cancel()
    backend.go.set()
    assert len((await second).token_ids) == 5
    assert first.cancelled()


def test_without_a_store_every_policy_waits_for_all_tokens(make: Make) -> None:
    tokenization = make([Letters()])
    for policy in Policy:
        assert tokenization.tokenize(TEXT, Waiting(policy)).complete


def test_odd_input_reaches_the_backend_which_names_the_field(make: Make) -> None:
    odd = ChatPrompt(model="m", messages=[{"role": object()}])
    with pytest.raises(TokenizationError, match="bad_messages"):
        make([Letters(TokenizationReason.BAD_MESSAGES)]).tokenize(odd)


def test_an_estimate_counts_characters_by_four() -> None:
    assert estimate(TextPrompt(model="m", text="x" * 400)).tokens == 100
    chat = ChatPrompt(model="m", messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 392}]}])
    assert estimate(chat).tokens == 100


def test_the_deadline_counts_over_all_backends(make: Make) -> None:
    slow = Letters(TokenizationReason.UNAVAILABLE)
    slow.go.clear()
    second = Letters()
    tokenization = make([slow, second])
    pending = tokenization.ask(TEXT, Waiting(timeout_s=0.03))
    time.sleep(0.05)
    slow.go.set()
    with pytest.raises(TokenizationError, match="within"):
        pending.result()
    assert second.calls == 0
