"""Block keys that are the engine's own hashes: what an event calls a block is what a prompt's block is looked for by.

So an event needs neither tokens nor parents: an offloaded block is understood at once. In exchange the index's blocks must be
the engine's, and its algorithm and seed must be known (``kvatlas doctor`` finds them).

vLLM's hashes do not tell models apart. A prompt is matched only with streams of its own model, and with those whose model is
not known. An adapter's name and path are hashed, so a query for an adapter under its own name (as OpenAI's ``model``) may be
for any stream that holds its blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import cast

import msgspec

from kvatlas.errors import RequestError
from kvatlas.keys.engine_hashes import WIRE_BYTES, ExtraKey, HashScheme
from kvatlas.keys.fast import native_block_keys
from kvatlas.keys.items import items_by_block
from kvatlas.types import BlockKey, MultimodalItem


class EngineKeys(msgspec.Struct, frozen=True):
    """Keys of engines that hash by ``scheme`` and cut blocks of ``block_size_tokens``.

    ``loras``: of each adapter by name what the engine hashes beside it: its path (``sha256_cbor_64bit``: its number).
    """

    scheme: HashScheme
    block_size_tokens: int = 16
    loras: Mapping[str, str] = msgspec.field(default_factory=dict)
    natively: bool = True
    """Let Rust compute them where it can; else Python, which is the specification."""

    @property
    def mode(self) -> str:
        """What the native core and snapshots call this: the algorithm is part of it."""
        return f"engine {self.scheme.algorithm}"

    @property
    def seed(self) -> str:
        return self.scheme.seed

    def confines(self, model: str, lora_name: str | None) -> bool:
        """Tell whether only streams of that very model (or of none that is known) can be meant."""
        return self._adapter(model, lora_name) != model

    def in_python(self) -> EngineKeys:
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
        """Return the hash of every whole block of a prompt; a partial last block has none.

        RequestError for an adapter whose path is not known, and for a multimodal item without a length.
        """
        extras = self._extra_keys(tokens, model, lora_name, cache_salt, multimodal)
        in_rust = self.natively and self.scheme.algorithm.startswith(("sha256_cbor", "xxhash_cbor"))
        if native_block_keys is None or not in_rust:
            return self._chain(tokens, extras)
        serialized = [(block, self.scheme.serialized(extras[block])) for block in sorted(extras)]
        found = native_block_keys(self.scheme.algorithm, self.scheme.none_hash(), tokens, self.block_size_tokens, serialized)
        return cast("list[BlockKey]", found.tolist())

    def _chain(self, tokens: array[int], extras: Mapping[int, Sequence[ExtraKey]]) -> list[BlockKey]:
        size = self.block_size_tokens
        keys: list[BlockKey] = []
        digest = self.scheme.none_hash()
        for block in range(len(tokens) // size):
            digest = self.scheme.block_hash(digest, tokens[block * size : (block + 1) * size], extras.get(block, ()))
            keys.append(BlockKey(int.from_bytes(digest[-WIRE_BYTES:], "big")))
        return keys

    def _extra_keys(
        self,
        tokens: array[int],
        model: str,
        lora_name: str | None,
        cache_salt: str | None,
        multimodal: Sequence[MultimodalItem],
    ) -> dict[int, list[ExtraKey]]:
        """Return the extra keys of each block that has any, in the order in which vLLM hashes them."""
        blocks = len(tokens) // self.block_size_tokens
        adapter = self._adapter(model, lora_name)
        extras: dict[int, list[ExtraKey]] = {}
        if adapter is not None:
            if adapter not in self.loras:
                remedy = "name it in keys.engine.loras with its path: engines hash it, and no event tells it"
                raise RequestError("lora_name", f"{adapter!r:.100} is no adapter whose path is known", remedy)
            extras = {block: [("lora", adapter, self.loras[adapter])] for block in range(blocks)}
        for block, items in items_by_block(multimodal, self.block_size_tokens, blocks).items():
            extras.setdefault(block, []).extend(("mm", item.hash, offset) for item, offset in items)
        if cache_salt:
            extras.setdefault(0, []).append(("cache_salt", cache_salt))
        return extras

    def _adapter(self, model: str, lora_name: str | None) -> str | None:
        return lora_name or (model if model in self.loras else None)
