"""What a tokenizer in this process can do: ``local/`` has them, ``stores/`` and ``incremental.py`` work with any of them."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Protocol

import msgspec

from kvatlas.tokens.prompts import ChatPrompt, Prompt
from kvatlas.tokens.seams import Seams

if TYPE_CHECKING:
    from kvatlas import _native


class Encoding(msgspec.Struct, frozen=True):
    """A text's tokens, without special tokens around it."""

    token_ids: array[int]
    """array('I')."""
    ends: array[int]
    """array('I'): where each token ends in the text, in characters (code points). Never falls."""


class TextTokenizer(Protocol):
    """Turns texts into tokens. Calls may come from several threads, and let go of the interpreter while they work."""

    @property
    def before(self) -> array[int]:
        """What ``add_special_tokens`` puts before a text, such as BOS."""
        ...

    @property
    def after(self) -> array[int]:
        """What it puts behind a text."""
        ...

    @property
    def native(self) -> _native.TextEncoder | None:
        """The native core's twin of it, if there is one: the same tokens."""
        ...

    def seams(self) -> Seams:
        """Return where its texts may be cut. Costs some milliseconds the first time: it looks at the whole vocabulary."""
        ...

    def encode(self, text: str) -> Encoding:
        """Return a text's own tokens. Marks of special tokens within it (``<|im_start|>``) become these tokens."""
        ...

    def ids(self, text: str) -> array[int]:
        """Return the same tokens as array('I'), without where they end, which is a third of the cost."""
        ...


class LocalTokenizer(Protocol):
    """One model's tokenizer with its chat template."""

    @property
    def name(self) -> str:
        """Which one: its directory, or its name on the hub."""
        ...

    @property
    def revision(self) -> str | None:
        """The hub's commit, or the beginning of a digest of its files."""
        ...

    @property
    def max_model_len(self) -> int | None:
        """Tokens that the model takes, by its own account; None where it does not say."""
        ...

    @property
    def chars_per_token_max(self) -> int:
        """Characters of its longest token: engines refuse texts that have more than this for each token they take."""
        ...

    @property
    def text(self) -> TextTokenizer | None:
        """How it tokenizes texts; None where prompts become tokens in one step (mistral_common)."""
        ...

    def around(self, prompt: Prompt) -> tuple[int, int]:
        """Return how many special tokens :meth:`tokenize` puts before and behind a prompt's own tokens."""
        ...

    def render(self, chat: ChatPrompt) -> str:
        """Return a chat as the text that its template makes of it. Only where ``text`` is there. Raises TokenizationError."""
        ...

    def tokenize(self, prompt: Prompt) -> array[int]:
        """Return all tokens of a prompt as array('I'), before any truncation. Raises TokenizationError."""
        ...
