"""Chains of block keys in Rust, where the native core is installed. Python's are the specification, and equal."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol


class BlockKeysFunction(Protocol):
    def __call__(
        self, recipe: str, root: bytes, tokens: array[int], block_size_tokens: int, extras: Sequence[tuple[int, bytes]]
    ) -> array[int]:
        """Return array('Q'): the keys of the whole blocks of ``tokens``. ``extras``: serialized, by block."""
        ...


def _find() -> BlockKeysFunction | None:
    try:
        from kvatlas import _native
    except ImportError:
        return None
    found = getattr(_native, "block_keys", None)
    if found is None:
        return None

    def block_keys(
        recipe: str, root: bytes, tokens: array[int], block_size_tokens: int, extras: Sequence[tuple[int, bytes]]
    ) -> array[int]:
        return array("Q", found(recipe, root, tokens, block_size_tokens, extras))

    return block_keys


native_block_keys = _find()
"""None where there is no native core."""
