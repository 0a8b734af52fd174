"""Known text prefixes and their tokens."""

from __future__ import annotations

from array import array
from typing import Protocol

import msgspec

from kvatlas.tokens.encoding import Encoding


class Known(msgspec.Struct, frozen=True):
    """The longest prefix of a text that a store knows.

    Its tokens are those of *some* text that begins with this prefix and was added: near the prefix's end they may depend on how
    that text went on. Only up to a seam (``seams.py``) are they the tokens of every text that begins so.
    """

    token_ids: array[int]
    """array('I')."""
    ends: array[int]
    """array('I'): where each token ends in the text, in characters. Never above ``chars``."""
    chars: int


class StoreStats(msgspec.Struct, frozen=True):
    """What a store holds. ``bytes_estimated`` is what its bound is held against."""

    entries: int
    chars: int
    tokens: int
    bytes_estimated: int
    evicted: int
    """Entries, since the store was made. What ``forget`` drops is not counted here."""


class PrefixStore(Protocol):
    """Remembers texts with their tokens, and finds the longest prefix that two texts share.

    ``space`` names a tokenizer and its revision; nothing is shared between spaces. Calls may come from several threads.
    What was not used for longest goes first when the bound in bytes is reached.
    """

    def find(self, space: str, text: str) -> Known:
        """Return the longest known prefix of a text; with nothing known, no tokens and 0 characters."""
        ...

    def add(self, space: str, text: str, encoding: Encoding) -> None:
        """Remember a text. ``encoding``: all of its tokens, exactly."""
        ...

    def stats(self) -> StoreStats:
        """Return what is held, over all spaces."""
        ...

    def forget(self, space: str) -> None:
        """Drop all that is known of a space. Costs a look at every entry of the store, at most."""
        ...
