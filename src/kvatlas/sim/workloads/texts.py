"""Tokens of texts that nobody wrote: as cheap as memory, and no two texts alike."""

from __future__ import annotations

from array import array

FIRST = 1 << 31
"""Texts made here have tokens from here on; those of traces have lower ones."""


class Texts:
    """New texts, one after the other. One that is asked for as the n-th is the same in each run.

    A text is its number, repeated: block keys are chained, so that blocks with equal tokens are not equal blocks.
    """

    def __init__(self, first: int = FIRST) -> None:
        self._next = first

    def new(self, tokens: int) -> array[int]:
        """Return a text that was not there before, of so many tokens."""
        number = self._next
        self._next = number + 1 if number < 0xFFFF_FFFF else FIRST
        return text(number, tokens)


def text(number: int, tokens: int) -> array[int]:
    """Return text ``number`` (0 to 2**32 - 1)."""
    return array("I", (number,)) * tokens
