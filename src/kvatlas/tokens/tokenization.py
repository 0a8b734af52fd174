"""A prompt's tokens from whichever backend can tell them, off the caller's thread, as soon as the caller needs them."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from functools import partial

import msgspec

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.observe.scrape import TokensState
from kvatlas.tokens.incremental import EncoderStats
from kvatlas.tokens.local.backend import LocalBackend
from kvatlas.tokens.native_threads import NativeThreads
from kvatlas.tokens.pending import STORED_WAIT_S, PendingTokens, counted, too_late
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt
from kvatlas.tokens.results import Backend, Estimate, RemoteBackend, Tokenized
from kvatlas.tokens.workers import Workers, too_many

_log = get_logger(__name__)

BYTES_PER_TOKEN = 4
"""About how much text a token stands for, in English."""

STORED_THREADS = 2
"""Threads that look into the store only: these never wait behind a long prompt."""


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
        self._threads = workers
        self._room = workers + queue_max
        self._native: NativeThreads | None = None
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
        return self._exact.in_flight + (self._native.in_flight if self._native else 0)

    @property
    def shared(self) -> int:
        """Times that a prompt in flight served another request for the same."""
        return self._exact.shared + (self._native.shared if self._native else 0)

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

    async def tokens(self, prompt: Prompt, waiting: Waiting | None = None) -> Tokenized:
        """Return a prompt's tokens. Raises TokenizationError.

        As ``ask(prompt).wait()``, but where the native core can do it alone, no Python thread works on it.
        """
        waiting = waiting or self.waiting
        if waiting.policy is Policy.EXACT and self.local is not None:
            found = await self._from_native(self.local, prompt, waiting.timeout_s)
            if found is not None:
                return found
        return await self.ask(prompt, waiting).wait()

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
        known = [some.stats() for some in local.known_texts] if local else []
        encoders = local.encoder_stats() if local else EncoderStats()
        circuits: dict[str, str] = {}
        for backend in self._backends:
            if isinstance(backend, RemoteBackend):
                circuits.update(backend.circuits())
        return TokensState(
            in_flight=self.in_flight,
            shared=self.shared,
            tokenizers=len(local.tokenizers.loaded()) if local else 0,
            store_bytes=sum(stats.bytes_estimated for stats in known),
            store_entries=sum(stats.entries for stats in known),
            store_evicted=sum(stats.evicted for stats in known),
            store_mismatches=encoders.mismatches,
            store_audit_failures=encoders.audit_failures,
            circuits=circuits,
        )

    def close(self) -> None:
        """Let go of threads and connections. What waits fails."""
        if self._native is not None:
            self._native.close()
        self._exact.close()
        self._stored.close()
        for backend in self._backends:
            backend.close()

    async def _from_native(self, local: LocalBackend, prompt: Prompt, timeout_s: float) -> Tokenized | None:
        """Return the tokens of a prompt that the native core can tokenize, and None for others."""
        try:
            work = local.native_work(prompt)
        except TokenizationError:
            return None  # ask() raises it, if no other backend knows more
        if work is None:
            return None
        with counted(self._failed, timeout_s):
            threads = self._native_threads()
            if threads is None:
                return None
            if self.in_flight >= self._room and not threads.knows(prompt):
                raise too_many(self._room)
            return await threads.tokens(prompt, work, timeout_s)

    def _native_threads(self) -> NativeThreads | None:
        """Return the threads that serve the running event loop: the first one that asks."""
        if self._native is None:
            self._native = NativeThreads.here(self._threads, self._made)
        return self._native if self._native.serves(asyncio.get_running_loop()) else None

    def _made(self, found: Tokenized, seconds: float) -> None:
        self._metrics.tokenized(found.source.value, seconds, len(found.token_ids), found.tokens_stored)

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
                failure = too_late(timeout_s)
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
                self._made(found, time.perf_counter() - began)
                return found
        raise failure

    def _look(self, key: Hashable, prompt: Prompt, timeout_s: float) -> Future[Tokenized]:
        """Ask the store; have the rest tokenized for later."""
        local = self.local
        assert local is not None

        def work() -> Tokenized:
            began = time.perf_counter()
            try:
                found = local.known(prompt)
            finally:
                self._later(key, prompt, timeout_s)  # not before: an answer says what was known when it was asked
            self._made(found, time.perf_counter() - began)
            return found

        return self._stored.submit(key, work)

    def _later(self, key: Hashable, prompt: Prompt, timeout_s: float) -> None:
        with contextlib.suppress(TokenizationError):  # too much waits: it is learnt when it comes again
            self._exact.submit(key, lambda: self._work(prompt, timeout_s))

    def _failed(self, error: TokenizationError) -> None:
        self._metrics.tokenization_failed(error.reason.value)


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


def _key(prompt: Prompt) -> Hashable:
    """Return what two equal prompts have in common, and no others."""
    if isinstance(prompt, TextPrompt):
        return prompt
    assert isinstance(prompt, ChatPrompt)
    try:
        return hashlib.blake2b(msgspec.msgpack.encode(prompt), digest_size=32).digest()
    except (TypeError, ValueError, OverflowError, RecursionError):
        return id(prompt)  # odd input: it is refused later, with its field


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
