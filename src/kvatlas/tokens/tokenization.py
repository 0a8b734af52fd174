"""A prompt's tokens from whichever backend can tell them, off the caller's thread, as soon as the caller needs them."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial

import msgspec

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.observe.scrape import TokensState
from kvatlas.tokens.incremental import EncoderStats
from kvatlas.tokens.local.backend import LocalBackend
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt
from kvatlas.tokens.results import Backend, Estimate, RemoteBackend, Tokenized
from kvatlas.tokens.workers import Workers

_log = get_logger(__name__)

BYTES_PER_TOKEN = 4
"""About how much text a token stands for, in English."""

STORED_THREADS = 2
"""Threads that look into the store only: these never wait behind a long prompt."""

STORED_WAIT_S = 0.25
"""How long what a store knows may take to come."""


class Policy(enum.Enum):
    """Which tokens a request waits for. See tokens.policy."""

    EXACT = "exact"
    STORED = "stored"
    WITHIN = "within"


class Waiting(msgspec.Struct, frozen=True):
    """How a request waits for its tokens."""

    policy: Policy = Policy.EXACT
    budget_s: float = 0.02
    """Of ``WITHIN``: how long it waits for all of them."""
    timeout_s: float = 5.0
    """After which they count as not to be had."""


class Tokenization:
    """Asks backends in order until one can tell. Thread-safe; nothing here runs on the caller's thread but hashing.

    ``local``: the backend that has a prefix store; without it every policy waits for all tokens.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        metrics: Metrics,
        *,
        local: LocalBackend | None = None,
        waiting: Waiting = Waiting(),  # noqa: B008  # frozen
        workers: int = 4,
        queue_max: int = 1024,
        warm: Sequence[str] = (),
    ) -> None:
        """``warm``: models whose tokenizers :meth:`warm` loads."""
        self._backends = tuple(backends)
        self.local = local
        self.waiting = waiting
        self._metrics = metrics
        self._warm = tuple(warm)
        self._warming: threading.Thread | None = None
        self._health = _Health()
        self._exact: Workers[Tokenized] = Workers(workers, queue_max, "kvatlas-tokenize")
        self._stored: Workers[Tokenized] = Workers(STORED_THREADS, queue_max, "kvatlas-stored")
        metrics.observe_tokens(self.state)

    @property
    def configured(self) -> bool:
        """Whether there is any backend."""
        return bool(self._backends)

    @property
    def in_flight(self) -> int:
        """Prompts that are tokenized now or wait for it."""
        return self._exact.in_flight

    @property
    def shared(self) -> int:
        """Times that a prompt in flight served another request for the same."""
        return self._exact.shared

    def ask(self, prompt: Prompt, waiting: Waiting | None = None) -> PendingTokens:
        """Begin to tokenize a prompt; hashing it is all that happens in this thread. TokenizationError where too much waits."""
        waiting = waiting or self.waiting
        key = _key(prompt)
        if waiting.policy is Policy.EXACT or self.local is None or not self.local.stores(prompt):
            return PendingTokens(self._begin(key, prompt, waiting.timeout_s), waiting.timeout_s, self._failed)
        if waiting.policy is Policy.STORED:
            return PendingTokens(self._look(key, prompt, waiting.timeout_s), STORED_WAIT_S, self._failed)
        exact = self._begin(key, prompt, waiting.timeout_s)
        look = partial(self._look, key, prompt, waiting.timeout_s)
        return PendingTokens(exact, waiting.budget_s, self._failed, then=look)

    def tokenize(self, prompt: Prompt, waiting: Waiting | None = None) -> Tokenized:
        """Return a prompt's tokens; waits for them. Raises TokenizationError."""
        return self.ask(prompt, waiting).result()

    def warm(self) -> None:
        """Begin to load tokenizers, so that no request waits for that. Returns at once; what fails is logged."""
        if self.local is not None and self._warm:
            self._warming = threading.Thread(target=self._load, name="kvatlas-warm", daemon=True)
            self._warming.start()

    def ready(self) -> tuple[bool, str]:
        """Return whether :meth:`warm` has loaded what it is to load, and why not. What failed counts as done."""
        if self._warming is not None and self._warming.is_alive():
            return False, f"tokenizers are loading: {', '.join(self._warm[:5])}"
        return True, "ok"

    def _load(self) -> None:
        assert self.local is not None
        failures = self.local.warm(self._warm)
        for status in self.local.tokenizers.loaded():
            _log.info("tokenizer loaded", models=status.models, revision=status.revision, seconds=round(status.load_s, 2))
        for model, error in failures.items():
            _log.warning(
                "tokenizer not loaded", model=model, reason=error.reason.value, problem=error.problem, remedy=error.remedy
            )

    def state(self) -> TokensState:
        """Return what is held and waited for, as metrics show it."""
        local = self.local
        store = local.store.stats() if local and local.store else None
        encoders = local.encoder_stats() if local else EncoderStats()
        circuits: dict[str, str] = {}
        for backend in self._backends:
            if isinstance(backend, RemoteBackend):
                circuits.update(backend.circuits())
        return TokensState(
            in_flight=self._exact.in_flight,
            shared=self._exact.shared,
            tokenizers=len(local.tokenizers.loaded()) if local else 0,
            store_bytes=store.bytes_estimated if store else 0,
            store_entries=store.entries if store else 0,
            store_evicted=store.evicted if store else 0,
            store_mismatches=encoders.mismatches,
            store_audit_failures=encoders.audit_failures,
            circuits=circuits,
        )

    def close(self) -> None:
        """Let go of threads and connections. What waits fails."""
        self._exact.close()
        self._stored.close()
        for backend in self._backends:
            backend.close()

    def _begin(self, key: Hashable, prompt: Prompt, timeout_s: float) -> Future[Tokenized]:
        try:
            return self._exact.submit(key, lambda: self._work(prompt, timeout_s))
        except TokenizationError as error:
            self._failed(error)
            raise

    def _work(self, prompt: Prompt, timeout_s: float) -> Tokenized:
        """Ask one backend after the other; the failure of the last one that was asked counts."""
        began = time.perf_counter()
        failure = TokenizationError(
            TokenizationReason.NO_BACKEND,
            "prompt",
            "no tokenizer is configured",
            "name tokenizers (tokens.directories, tokens.models), a renderer (tokens.renderer) or a service (tokens.service)",
        )
        for backend in self._backends:
            left_s = timeout_s - (time.perf_counter() - began)
            if left_s <= 0:
                failure = _too_late(timeout_s)
                break
            try:
                found = backend.tokenize(prompt, left_s)
            except TokenizationError as error:
                self._health.failed(backend, error)
                failure = _worth_telling(failure, error)
                if not error.reason.of_backend:
                    break
            else:
                self._health.works(backend)
                seconds = time.perf_counter() - began
                self._metrics.tokenized(found.source.value, seconds, len(found.token_ids), found.tokens_stored)
                return found
        raise failure

    def _look(self, key: Hashable, prompt: Prompt, timeout_s: float) -> Future[Tokenized]:
        """Ask the store; have the rest tokenized for later."""
        local = self.local
        assert local is not None

        def work() -> Tokenized:
            began = time.perf_counter()
            self._later(key, prompt, timeout_s)
            found = local.known(prompt)
            seconds = time.perf_counter() - began
            self._metrics.tokenized(found.source.value, seconds, len(found.token_ids), found.tokens_stored)
            return found

        return self._stored.submit(key, work)

    def _later(self, key: Hashable, prompt: Prompt, timeout_s: float) -> None:
        with contextlib.suppress(TokenizationError):  # too much waits: it is learnt when it comes again
            self._exact.submit(key, lambda: self._work(prompt, timeout_s))

    def _failed(self, error: TokenizationError) -> None:
        self._metrics.tokenization_failed(error.reason.value)


class PendingTokens:
    """Tokens to come: :meth:`result` waits in a thread, :meth:`wait` in an event loop. Both raise TokenizationError."""

    def __init__(
        self,
        first: Future[Tokenized],
        first_s: float,
        failed: Callable[[TokenizationError], None],
        *,
        then: Callable[[], Future[Tokenized]] | None = None,
    ) -> None:
        """``then``: what is waited for where the first does not come in time. ``failed``: told each failure, once a caller."""
        self._first = first
        self._first_s = first_s
        self._failed = failed
        self._then = then

    def result(self) -> Tokenized:
        """Block until they are there."""
        with self._counted():
            try:
                return self._first.result(self._first_s)
            except TimeoutError:
                if self._then is None:
                    raise
            return self._then().result(STORED_WAIT_S)

    async def wait(self) -> Tokenized:
        """Wait until they are there. Cancelling ends the waiting, not the work."""
        with self._counted():
            try:
                return await _within(self._first, self._first_s)
            except TimeoutError:
                if self._then is None:
                    raise
            return await _within(self._then(), STORED_WAIT_S)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except TokenizationError as error:
            self._failed(error)
            raise
        except TimeoutError:
            late = _too_late(self._first_s)
            self._failed(late)
            raise late from None
        except CancelledError:
            closed = TokenizationError(TokenizationReason.BUSY, "prompt", "the tokenizer is closed", "ask again later")
            self._failed(closed)
            raise closed from None


def estimate(prompt: Prompt) -> Estimate:
    """Return about how many tokens a prompt has: its characters by four. For load and cost, where tokens can't be told."""
    if isinstance(prompt, TextPrompt):
        return Estimate(len(prompt.text) // BYTES_PER_TOKEN)
    return Estimate(sum(_chars(message) for message in prompt.messages) // BYTES_PER_TOKEN)


def _chars(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_chars, value.values()))
    return sum(map(_chars, value)) if isinstance(value, list | tuple) else 0


async def _within(future: Future[Tokenized], seconds: float) -> Tokenized:
    """Wait for shared work: it goes on when the waiting ends."""
    waiting: asyncio.Future[Tokenized] = asyncio.wrap_future(future)
    waiting.add_done_callback(_look_at)
    return await asyncio.wait_for(asyncio.shield(waiting), seconds)


def _look_at(future: asyncio.Future[Tokenized]) -> None:
    if not future.cancelled():
        future.exception()  # nobody may be waiting any more


def _key(prompt: Prompt) -> Hashable:
    """Return what two equal prompts have in common, and no others."""
    if isinstance(prompt, TextPrompt):
        return prompt
    assert isinstance(prompt, ChatPrompt)
    try:
        return hashlib.blake2b(msgspec.msgpack.encode(prompt), digest_size=32).digest()
    except (TypeError, ValueError, OverflowError, RecursionError):
        return id(prompt)  # odd input: it is refused later, with its field


def _too_late(timeout_s: float) -> TokenizationError:
    return TokenizationError(
        TokenizationReason.TIMEOUT,
        "prompt",
        f"its tokens were not there within {timeout_s:g} s",
        "ask again (the work goes on), route without precise scoring, or raise tokens.timeout",
    )


def _worth_telling(known: TokenizationError, new: TokenizationError) -> TokenizationError:
    """Of two backends' failures return the one that helps, with a word about the other.

    That a model is unknown here says less than what was said elsewhere.
    """
    if known.reason is TokenizationReason.NO_BACKEND:
        return new
    main, other = (known, new) if new.reason is TokenizationReason.UNKNOWN_MODEL else (new, known)
    problem = f"{main.problem} (and elsewhere, {other.reason.value}: {other.problem:.200})"
    return TokenizationError(main.reason, main.field, problem, main.remedy)


class _Health:
    """Logs when a backend begins to fail, and when it works again: not each time."""

    def __init__(self) -> None:
        self._failing: dict[int, TokenizationReason] = {}

    def failed(self, backend: Backend, error: TokenizationError) -> None:
        """Note a failure that is the backend's own."""
        if error.reason.transient and self._failing.get(id(backend)) is not error.reason:
            self._failing[id(backend)] = error.reason
            _log.warning(
                "tokens cannot be had", backend=type(backend).__name__, reason=error.reason.value, problem=error.problem
            )

    def works(self, backend: Backend) -> None:
        if self._failing and self._failing.pop(id(backend), None) is not None:
            _log.info("tokens can be had again", backend=type(backend).__name__)
