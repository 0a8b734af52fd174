"""Tokenizers in memory: each loaded once, a bounded number kept."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import msgspec

from kvatlas.errors import ConfigError, TokenizationError, TokenizationReason
from kvatlas.tokens.encoding import LocalTokenizer
from kvatlas.tokens.local.catalog import Catalog, Found
from kvatlas.tokens.local.formats import Kind, digest

RETRY_AFTER_S = 10.0
"""How long a tokenizer that could not be loaded is left alone."""
FAILURES_MAX = 256
NAMES_MAX = 4096
"""Models whose tokenizer is remembered: many served names (adapters, say) may share one."""
TEMPLATE_BYTES_MAX = 4 << 20


class Loader(Protocol):
    """Reads a tokenizer from its directory: ``load_huggingface``, ``load_mistral``."""

    def __call__(
        self,
        directory: Path,
        *,
        name: str,
        revision: str | None,
        chat_template: str | None = None,
        trust_request_template: bool = False,
    ) -> LocalTokenizer:
        """Raises TokenizationError."""
        ...


class Status(msgspec.Struct, frozen=True):
    """A tokenizer in memory."""

    models: tuple[str, ...]
    """Which models asked for it, of those that are remembered."""
    name: str
    revision: str | None
    kind: Kind
    load_s: float


class _Key(msgspec.Struct, frozen=True):
    """What makes two models' tokenizers the same one."""

    directory: Path
    kind: Kind
    chat_template: str | None


class _Held(msgspec.Struct, frozen=True):
    tokenizer: LocalTokenizer
    kind: Kind
    load_s: float


class LoadedTokenizers:
    """Loads tokenizers when they are first asked for. The least recently used go beyond ``loaded_max``. Safe for threads.

    No lock is held while one loads: others are to be had meanwhile. Who asks for the one that loads waits for it.
    """

    def __init__(
        self,
        catalog: Catalog,
        loaders: Mapping[Kind, Loader],
        loaded_max: int,
        *,
        chat_templates: Mapping[str, str] | None = None,
        trust_request_template: bool = False,
        retry_after_s: float = RETRY_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``chat_templates``: model to a file, read here. Raises ConfigError where one can't be read."""
        self.catalog = catalog
        self._loaders = dict(loaders)
        self._loaded_max = loaded_max
        self._templates = {model: _read_template(model, file) for model, file in (chat_templates or {}).items()}
        self._trust_request_template = trust_request_template
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._lock = threading.Lock()
        self._held: OrderedDict[_Key, _Held] = OrderedDict()
        self._names: OrderedDict[str, _Key] = OrderedDict()
        self._loading: dict[_Key, Future[_Held]] = {}
        self._failed: OrderedDict[_Key, tuple[float, TokenizationError]] = OrderedDict()
        self.loads = 0
        self.load_failures = 0
        self.evictions = 0

    def get(self, model: str) -> LocalTokenizer:
        """Return a model's tokenizer, loaded if need be. Raises TokenizationError; the same again for a while."""
        with self._lock:
            known = self._known(model)
        if known is not None:
            return known
        found = self.catalog.find(model)
        key = _Key(found.directory, found.kind, self._templates.get(model))
        with self._lock:
            self._names[model] = key
            self._names.move_to_end(model)
            while len(self._names) > NAMES_MAX:
                self._names.popitem(last=False)
            held = self._held.get(key)
            if held is not None:
                self._held.move_to_end(key)
                return held.tokenizer
            self._check_not_failed(key)
            future = self._loading.get(key)
            mine = future is None
            if future is None:
                future = self._loading[key] = Future()
        if mine:
            self._load(key, found, future)
        try:
            return future.result().tokenizer
        except TokenizationError as error:
            raise _again(error) from None

    def peek(self, model: str) -> LocalTokenizer | None:
        """Return a model's tokenizer if it is in memory, and was asked for by this name. Never waits for one to be loaded."""
        with self._lock:
            return self._known(model)

    def loaded(self) -> list[Status]:
        """Return what is in memory, the most recently used first."""
        with self._lock:
            models: dict[_Key, list[str]] = {}
            for model, key in self._names.items():
                models.setdefault(key, []).append(model)
            return [
                Status(tuple(sorted(models.get(key, ()))), held.tokenizer.name, held.tokenizer.revision, held.kind, held.load_s)
                for key, held in reversed(self._held.items())
            ]

    def warm(self, models: Iterable[str]) -> dict[str, TokenizationError]:
        """Load these models' tokenizers, one after the other; return what went wrong, by model."""
        failures = {}
        for model in models:
            try:
                self.get(model)
            except TokenizationError as error:
                failures[model] = error
        return failures

    def _known(self, model: str) -> LocalTokenizer | None:
        """Return a tokenizer that is in memory, which counts as using it."""
        key = self._names.get(model)
        held = None if key is None else self._held.get(key)
        if key is None or held is None:
            return None
        self._held.move_to_end(key)
        self._names.move_to_end(model)
        return held.tokenizer

    def _check_not_failed(self, key: _Key) -> None:
        failed = self._failed.get(key)
        if failed is None:
            return
        until, error = failed
        if self._clock() < until:
            raise _again(error)
        del self._failed[key]

    def _load(self, key: _Key, found: Found, future: Future[_Held]) -> None:
        """Load, and tell all who wait. Does not raise: the future has the error."""
        begun = time.perf_counter()
        try:
            tokenizer = self._read(key, found)
        except BaseException as error:
            told = error if isinstance(error, TokenizationError) else _broken(found, error)
            with self._lock:
                self.load_failures += 1
                self._failed[key] = (self._clock() + self._retry_after_s, told)
                self._failed.move_to_end(key)
                while len(self._failed) > FAILURES_MAX:
                    self._failed.popitem(last=False)
                del self._loading[key]
            future.set_exception(told)
            if not isinstance(error, Exception):
                raise
        else:
            held = _Held(tokenizer, found.kind, time.perf_counter() - begun)
            with self._lock:
                self.loads += 1
                self._held[key] = held
                self._held.move_to_end(key)
                while len(self._held) > self._loaded_max:
                    self._held.popitem(last=False)
                    self.evictions += 1
                del self._loading[key]
            future.set_result(held)

    def _read(self, key: _Key, found: Found) -> LocalTokenizer:
        loader = self._loaders.get(found.kind)
        if loader is None:
            problem = f"{found.directory} has a tokenizer of kind {found.kind}, which nothing here reads"
            raise TokenizationError(TokenizationReason.NOT_INSTALLED, "model", problem, "pip install 'kvatlas[tokens]'")
        return loader(
            found.directory,
            name=found.name,
            revision=found.revision or digest(found.directory),
            chat_template=key.chat_template,
            trust_request_template=self._trust_request_template,
        )


def _again(error: TokenizationError) -> TokenizationError:
    """Return a copy: an error that several threads raise would collect all their tracebacks."""
    return TokenizationError(error.reason, error.field, error.problem, error.remedy)


def _broken(found: Found, error: BaseException) -> TokenizationError:
    problem = f"the tokenizer in {found.directory} cannot be loaded ({type(error).__name__}: {str(error)[:200]})"
    return TokenizationError(TokenizationReason.BROKEN_TOKENIZER, "model", problem, "bring its files again, whole")


def _read_template(model: str, file: str) -> str:
    allowed = f"a readable UTF-8 file of at most {TEMPLATE_BYTES_MAX} bytes"
    try:
        with Path(file).expanduser().open("rb") as opened:
            content = opened.read(TEMPLATE_BYTES_MAX + 1)
        if len(content) > TEMPLATE_BYTES_MAX:
            raise ConfigError(f"tokens.chatTemplates.{model}", f"{file!r} is too large", allowed)
        return content.decode()
    except OSError as error:
        raise ConfigError(f"tokens.chatTemplates.{model}", f"cannot read {file!r}: {error.strerror}", allowed) from None
    except ValueError:
        raise ConfigError(f"tokens.chatTemplates.{model}", f"{file!r} is not text", allowed) from None
