"""A prompt's tokens, where they came from, and how far they can be trusted."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import msgspec

from kvatlas.tokens.prompts import Prompt
from kvatlas.types import MultimodalItem


class TokenSource(enum.Enum):
    """Where tokens came from.

    ``LOCAL``: a tokenizer in this process. ``STORE``: the same, with tokens of a known prefix. ``RENDERER``: an engine's render
    endpoint. ``SERVICE``: a tokenization service over gRPC.
    """

    LOCAL = "local"
    STORE = "store"
    RENDERER = "renderer"
    SERVICE = "service"


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a prompt, exactly as the engine will see them.

    There are no inexact tokens: an estimate of their number is an :class:`Estimate`, which has none to score with.
    """

    token_ids: array[int]
    source: TokenSource
    tokenizer: str
    """Which one: a path, a model's name, or an address."""
    revision: str | None = None
    """Of the tokenizer: a commit of the hub, or the beginning of a digest of its files; None where it is not told."""
    complete: bool = True
    """False: these are the first tokens of the prompt, and what follows is not known yet. What they match is a lower bound."""
    multimodal: tuple[MultimodalItem, ...] = ()
    tokens_stored: int = 0
    """How many of them a prefix store knew."""


class Estimate(msgspec.Struct, frozen=True):
    """About how many tokens a prompt has, from its bytes, where they can't be told. Good for load, never for scoring."""

    tokens: int


class Backend(Protocol):
    """A place where prompts become tokens. Calls may come from several threads."""

    def tokenize(self, prompt: Prompt, timeout_s: float) -> Tokenized:
        """Return a prompt's tokens. Raises TokenizationError; its ``reason`` says whether another backend may know more."""
        ...

    def close(self) -> None:
        """Let go of connections and threads."""
        ...


@runtime_checkable
class RemoteBackend(Backend, Protocol):
    """A backend that asks others, and leaves those alone that fail."""

    def circuits(self) -> Mapping[str, str]:
        """Return the state of each endpoint's circuit: closed, open, half-open."""
        ...
