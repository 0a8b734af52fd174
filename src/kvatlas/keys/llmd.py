"""llm-d's block keys, so that an index can share keys with theirs. Read in llm-d-kv-cache ``pkg/kvcache/kvblock``.

    llmd-cbor-fnv  root  = H(FNV-1a-64(seed), null, model or adapter name)
                   key_i = H(key_{i-1}, tokens of block i, extras of block i or null)      H = FNV-1a-64 of canonical CBOR
    llmd-xxh64     root  = XXH64( LE64(XXH64(seed)) || LE64(len(model)) || model )
                   key_i = XXH64( LE64(key_{i-1}) || LE32(token)... || (LE64(len(extra)) || extra)... )

Extras of a block: the hash of every multimodal item that overlaps it, by position, as ``{"Hash": hash}`` in CBOR. What else an
engine hashes they either take for such an item (the salt, which their writer reads so and their reader leaves out) or drop
(a digest of prompt embeddings). Here both are extras of the block that they are in, the digest in hexadecimal, so that no block
is taken for another; a prompt without them has their keys exactly.

An event says where in a block an item starts, but not where it ends. So where the engine's blocks are larger than the index's,
an item counts for all of an engine's block from its start on; what follows a shorter item inside of it no prompt finds.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Literal, cast

import msgspec
import xxhash

from kvatlas.keys.cbor import cbor
from kvatlas.keys.chain import ChainEnd, little_endian
from kvatlas.keys.fast import native_block_keys
from kvatlas.keys.items import items_by_block
from kvatlas.types import BlockKey, Extra, MultimodalItem

LlmdMode = Literal["llmd-cbor-fnv", "llmd-xxh64"]

_MASK = (1 << 64) - 1


class LlmdKeys(msgspec.Struct, frozen=True):
    """How llm-d computes block keys. ``seed``: its ``hashSeed``."""

    block_size_tokens: int = 16
    seed: str = ""
    mode: LlmdMode = "llmd-cbor-fnv"
    natively: bool = True
    """Let Rust compute prompts' keys where it is installed; else Python, which is the specification."""

    def confines(self, model: str, lora_name: str | None) -> bool:
        """Keys tell models apart."""
        return False

    def root(self, model_or_adapter: str) -> ChainEnd:
        """Return the start of every chain of a model; a LoRA adapter's name stands in for its model's."""
        model = model_or_adapter.encode("utf-8", "surrogatepass")
        seed = self.seed.encode()
        if self.mode == "llmd-xxh64":
            return ChainEnd(_xxh64(xxhash.xxh64_intdigest(seed), b"", [model]))
        return ChainEnd(_fnv1a_64(cbor((_fnv1a_64(seed), None, model_or_adapter))))

    def extend(self, end: ChainEnd, tokens: array[int], extras: Sequence[Extra] = ()) -> tuple[list[BlockKey], ChainEnd]:
        """Append an engine's block to a chain; return the keys of the blocks that it completes, and the new end.

        ``extras``: offsets count from the first of ``tokens``. An item (kind ``mm``) that starts before them goes on in them.
        """
        size = self.block_size_tokens
        before = len(end.pending)
        given = len(tokens)
        tokens = end.pending + tokens
        placed = [(extra, 0, before) for extra in end.extras]  # extra, the tokens that it touches
        for extra in extras:
            at = extra.offset_tokens + before
            first, last = (max(at, before), len(tokens)) if extra.kind == "mm" else (at, at + 1)
            if extra.offset_tokens < given and first >= before:
                placed.append((Extra(at, extra.kind, extra.value), first, last))
        placed.sort(key=lambda one: (one[0].kind != "mm", one[0]))
        keys: list[BlockKey] = []
        key = end.key
        cut = len(tokens) - len(tokens) % size
        for start in range(0, cut, size):
            values = [_value(extra) for extra in _touching(placed, start, start + size)]
            key = self._next(key, tokens[start : start + size], values)
            keys.append(BlockKey(key))
        left = _touching(placed, cut, len(tokens))
        rest = tuple(Extra(extra.offset_tokens - cut, extra.kind, extra.value) for extra in left)
        return keys, ChainEnd(key, tokens[cut:], rest)

    def in_python(self) -> LlmdKeys:
        """Return the same keys, computed without Rust."""
        return msgspec.structs.replace(self, natively=False)

    def keys(
        self,
        tokens: array[int],
        model: str,
        *,
        lora_name: str | None = None,
        cache_salt: str | None = None,
        multimodal: Sequence[MultimodalItem] = (),
    ) -> list[BlockKey]:
        """Return the key of every whole block of a prompt; a partial last block has none.

        RequestError for a multimodal item without a length.
        """
        root, values = self._prompt(tokens, lora_name or model, cache_salt, multimodal)
        if native_block_keys is None or not self.natively:
            return self._chain(root, tokens, values)
        extras = [(block, self._serialized(values[block])) for block in sorted(values)]
        found = native_block_keys(self.mode, root.to_bytes(8, "big"), tokens, self.block_size_tokens, extras)
        return cast("list[BlockKey]", found.tolist())

    def _prompt(
        self, tokens: array[int], root: str, cache_salt: str | None, multimodal: Sequence[MultimodalItem]
    ) -> tuple[int, dict[int, list[bytes]]]:
        """Return the root's key, and the values of the extras of each block that has any."""
        blocks = len(tokens) // self.block_size_tokens
        items = items_by_block(multimodal, self.block_size_tokens, blocks)
        values = {block: [item.hash.encode("utf-8", "surrogatepass") for item, _ in here] for block, here in items.items()}
        if cache_salt:
            values.setdefault(0, []).append(cache_salt.encode("utf-8", "surrogatepass"))
        return self.root(root).key, values

    def _chain(self, root: int, tokens: array[int], values: dict[int, list[bytes]]) -> list[BlockKey]:
        size = self.block_size_tokens
        keys: list[BlockKey] = []
        key = root
        for block in range(len(tokens) // size):
            key = self._next(key, tokens[block * size : (block + 1) * size], values.get(block, []))
            keys.append(BlockKey(key))
        return keys

    def _next(self, parent: int, tokens: array[int], values: Sequence[bytes]) -> int:
        if self.mode == "llmd-xxh64":
            return _xxh64(parent, little_endian(tokens).tobytes(), values)
        return _fnv1a_64(b"\x83" + cbor(parent) + cbor(tuple(tokens)) + self._serialized(values))

    def _serialized(self, values: Sequence[bytes]) -> bytes:
        if self.mode == "llmd-xxh64":
            return b"".join(map(_with_length, values))
        return cbor(tuple({"Hash": value.decode("utf-8", "surrogatepass")} for value in values) or None)


def _touching(placed: Sequence[tuple[Extra, int, int]], start: int, end: int) -> list[Extra]:
    """Return the extras that touch some tokens, each once."""
    return list(dict.fromkeys(extra for extra, first, last in placed if first < end and start < last))


def _value(extra: Extra) -> bytes:
    return extra.value if extra.kind in ("mm", "salt") else extra.value.hex().encode()


def _xxh64(parent: int, tokens: bytes, values: Sequence[bytes]) -> int:
    return xxhash.xxh64_intdigest(parent.to_bytes(8, "little") + tokens + b"".join(map(_with_length, values)))


def _with_length(value: bytes) -> bytes:
    return len(value).to_bytes(8, "little") + value


def _fnv1a_64(content: bytes) -> int:
    digest = 0xCBF29CE484222325
    for byte in content:
        digest = (digest ^ byte) * 0x100000001B3 & _MASK
    return digest
