"""Chains of block keys in Rust, where the native core is installed. Python's are the specification, and equal."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol, cast


class BlockKeysFunction(Protocol):
    def __call__(
        self, recipe: str, root: bytes, tokens: array[int], block_size_tokens: int, extras: Sequence[tuple[int, bytes]]
    ) -> bytes:
        """Return the keys of the whole blocks of ``tokens``: the bytes of an array('Q'). ``extras``: serialized, by block."""
        ...


def _find() -> BlockKeysFunction | None:
    try:
        from kvatlas import _native
    except ImportError:
        return None
    return cast("BlockKeysFunction | None", getattr(_native, "block_keys", None))


native_block_keys = _find()
"""None where there is no native core."""
