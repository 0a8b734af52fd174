"""Event streams for benchmarks: vLLM 0.32 payloads of many pods, seeded."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

import msgspec

BLOCK_TOKENS = 16
CHAIN_BLOCKS = 2048
"""Blocks of one prompt: chains of 32,768 tokens."""


class Chain:
    """One prompt's blocks as an engine names them."""

    def __init__(self, number: int, blocks: int = CHAIN_BLOCKS) -> None:
        self._random = random.Random(number)
        self.tokens = array("I", (self._random.randrange(150_000) for _ in range(blocks * BLOCK_TOKENS)))
        self.hashes = [self._random.getrandbits(64) for _ in range(blocks)]

    def stored(self, blocks_per_event: int) -> Iterator[bytes]:
        """Yield the payloads that store the whole chain, one event each."""
        for start in range(0, len(self.hashes), blocks_per_event):
            hashes = self.hashes[start : start + blocks_per_event]
            tokens = self.tokens[start * BLOCK_TOKENS : (start + len(hashes)) * BLOCK_TOKENS]
            event = {
                "type": "BlockStored",
                "block_hashes": hashes,
                "parent_block_hash": self.hashes[start - 1] if start else None,
                "token_ids": tokens.tolist(),
                "block_size": BLOCK_TOKENS,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [None] * len(hashes),
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            }
            yield msgspec.msgpack.encode([1.0, [event], 0])

    def removed(self) -> Iterator[bytes]:
        """Yield the payloads that remove the whole chain from its end: one hash an event, 64 events a payload."""
        for start in range(0, len(self.hashes), 64):
            events = [
                {"type": "BlockRemoved", "block_hashes": [block], "medium": "GPU", "group_idx": 0}
                for block in reversed(self.hashes[start : start + 64])
            ]
            yield msgspec.msgpack.encode([1.0, events, 0])
