"""Block keys: a 64-bit chained hash over parent, token ids and extra keys.

    key_i = XXH3-64( LE64(key_{i-1}) || LE32(token) for each token of block i || extras of block i )
    extra = LE32(offset in the block) || LE32(len(kind)) || kind || LE32(len(value)) || value
    key_{-1} = XXH3-64( "kvatlas/1" || LE32(len(seed)) || seed || model or adapter name )

The token count of a block is fixed, so nothing can be read in two ways.

A chain is a stream of tokens that engine and index may cut at different sizes. :class:`ChainEnd` carries what the last cut
left over, so blocks of any engine size feed keys of the index's size: one engine block may end several keys, or several
engine blocks may be needed for one.

An item that starts in a block (an image) is part of that block's key only; later blocks inherit it through the chain. So both
sides can tell from the start position alone, whatever the block size.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, cast

import msgspec
import xxhash

from kvatlas.keys.fast import native_block_keys
from kvatlas.types import BlockKey, Extra, MultimodalItem

ROOTS_MAX = 4096
"""Roots that are remembered: models' names come from requests."""

_NO_TOKENS: array[int] = array("I")


class ChainEnd(msgspec.Struct, frozen=True, gc=False):
    """Where a chain of tokens stands: the last key, and the tokens and extras after it that do not fill a block yet."""

    key: int
    pending: array[int] = _NO_TOKENS
    extras: tuple[Extra, ...] = ()


class KeySchema(msgspec.Struct, frozen=True):
    """How a deployment computes block keys of our own kind. All replicas that share keys share these settings."""

    mode: ClassVar[str] = "kvatlas"

    block_size_tokens: int = 16
    seed: str = ""
    natively: bool = True
    """Let Rust compute prompts' keys where it is installed; else Python, which is the specification."""

    def in_python(self) -> KeySchema:
        """Return the same keys, computed without Rust."""
        return msgspec.structs.replace(self, natively=False)

    def confines(self, model: str, lora_name: str | None) -> bool:
        """Keys tell models apart."""
        return False

    def root(self, model_or_adapter: str) -> ChainEnd:
        """Return the start of every chain of a model; a LoRA adapter's name stands in for its model's."""
        return _root(self.seed, model_or_adapter)

    def extend(self, end: ChainEnd, tokens: array[int], extras: Sequence[Extra] = ()) -> tuple[list[BlockKey], ChainEnd]:
        """Append ``tokens`` to a chain; return the keys of the blocks that they complete, and the new end.

        ``extras``: offsets count from the first of ``tokens``; one that starts before them (negative) is in an earlier key,
        and one behind them belongs to no block here.
        """
        size = self.block_size_tokens
        left_over = len(end.pending)
        given = len(tokens)
        if left_over:
            tokens = end.pending + tokens
        here = list(end.extras)
        here.extend(
            Extra(extra.offset_tokens + left_over, extra.kind, extra.value)
            for extra in extras
            if 0 <= extra.offset_tokens < given
        )
        here.sort()
        view = memoryview(little_endian(tokens)).cast("B")
        keys: list[BlockKey] = []
        key = end.key
        taken = 0
        for start in range(0, len(tokens) - size + 1, size):
            content = key.to_bytes(8, "little") + view[start * 4 : (start + size) * 4]
            while taken < len(here) and here[taken].offset_tokens < start + size:
                content += _extra_bytes(here[taken], start)
                taken += 1
            key = xxhash.xxh3_64_intdigest(content)
            keys.append(BlockKey(key))
        cut = len(keys) * size
        rest = tuple(Extra(extra.offset_tokens - cut, extra.kind, extra.value) for extra in here[taken:])
        return keys, ChainEnd(key, tokens[cut:] if cut < len(tokens) else _NO_TOKENS, rest)

    def keys(
        self,
        tokens: array[int],
        model: str,
        *,
        lora_name: str | None = None,
        cache_salt: str | None = None,
        multimodal: Sequence[MultimodalItem] = (),
    ) -> list[BlockKey]:
        """Return the key of every whole block of a prompt; a partial last block has none."""
        root = self.root(lora_name or model)
        extras = prompt_extras(cache_salt, multimodal)
        if native_block_keys is None or not self.natively:
            return self.extend(root, tokens, extras)[0]
        size = self.block_size_tokens
        serialized: dict[int, bytes] = {}
        for extra in sorted(extra for extra in extras if extra.offset_tokens >= 0):
            block = extra.offset_tokens // size
            serialized[block] = serialized.get(block, b"") + _extra_bytes(extra, block * size)
        found = native_block_keys(self.mode, root.key.to_bytes(8, "big"), tokens, size, list(serialized.items()))
        return cast("list[BlockKey]", found.tolist())


@lru_cache(ROOTS_MAX)
def _root(seed: str, model_or_adapter: str) -> ChainEnd:
    told = seed.encode()
    name = model_or_adapter.encode("utf-8", "surrogatepass")
    return ChainEnd(xxhash.xxh3_64_intdigest(b"kvatlas/1" + len(told).to_bytes(4, "little") + told + name))


def prompt_extras(cache_salt: str | None, multimodal: Sequence[MultimodalItem]) -> list[Extra]:
    """Return a prompt's extras as an engine's events would carry them: the salt on block 0, items where they start."""
    extras = [Extra(item.offset_tokens, "mm", item.hash.encode("utf-8", "surrogatepass")) for item in multimodal]
    if cache_salt:
        extras.append(Extra(0, "salt", cache_salt.encode("utf-8", "surrogatepass")))
    return extras


def _extra_bytes(extra: Extra, block_start: int) -> bytes:
    kind = extra.kind.encode()
    return b"".join(
        (
            (extra.offset_tokens - block_start).to_bytes(4, "little"),
            len(kind).to_bytes(4, "little"),
            kind,
            len(extra.value).to_bytes(4, "little"),
            extra.value,
        )
    )


def little_endian(tokens: array[int]) -> array[int]:
    """Return tokens in the byte order that is hashed."""
    if sys.byteorder == "little":
        return tokens
    swapped = array("I", tokens)
    swapped.byteswap()
    return swapped


def shared_blocks(run: Sequence[int], keys: Sequence[int], at: int) -> int:
    """Return how many blocks of a run follow in ``keys`` from ``at``; the first one does.

    Keys are chained: where two are equal, all before them are.
    """
    low, high = 1, min(len(run), len(keys) - at)
    while low < high:
        middle = (low + high + 1) // 2
        if run[middle - 1] == keys[at + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
