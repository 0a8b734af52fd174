"""Event streams for benchmarks: vLLM 0.32 payloads of many pods, the same on every side for the same seeds.

The workers of both sides import this module, so nothing of kvatlas is imported here.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from typing import Literal

import msgspec

BLOCK_TOKENS = 16
CHAIN_BLOCKS = 2048
"""Blocks of one prompt: chains of 32,768 tokens."""

_TOKEN_BITS = 17
"""A vocabulary of 131,072: half of the ids take five bytes of msgpack, half take three or fewer."""


class Chain:
    """One prompt's blocks as an engine names them."""

    def __init__(self, number: int, blocks: int = CHAIN_BLOCKS) -> None:
        source = random.Random(number)
        count = blocks * BLOCK_TOKENS
        mask = int.from_bytes(((1 << _TOKEN_BITS) - 1).to_bytes(4, "little") * count, "little")
        drawn = int.from_bytes(source.randbytes(4 * count), "little") & mask
        self.tokens = array("I", drawn.to_bytes(4 * count, "little"))
        self.hashes = array("Q", source.randbytes(8 * blocks)).tolist()

    def stored(self, blocks_per_event: int, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield the payloads that store the chain's blocks from ``start`` to ``stop``, one event each."""
        end = len(self.hashes) if stop is None else stop
        for first in range(start, end, blocks_per_event):
            hashes = self.hashes[first : min(end, first + blocks_per_event)]
            tokens = self.tokens[first * BLOCK_TOKENS : (first + len(hashes)) * BLOCK_TOKENS]
            event = {
                "type": "BlockStored",
                "block_hashes": hashes,
                "parent_block_hash": self.hashes[first - 1] if first else None,
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

    def removed(self, hashes_per_event: int = 1, events_per_payload: int = 64, stop: int | None = None) -> Iterator[bytes]:
        """Yield the payloads that remove the chain's blocks before ``stop``, its end first.

        What vLLM sends is one hash an event, and all events of an engine step in one payload.
        """
        hashes = self.hashes[:stop][::-1]
        per_payload = hashes_per_event * events_per_payload
        for first in range(0, len(hashes), per_payload):
            events = [
                {
                    "type": "BlockRemoved",
                    "block_hashes": hashes[at : min(first + per_payload, at + hashes_per_event)],
                    "medium": "GPU",
                    "group_idx": 0,
                }
                for at in range(first, min(len(hashes), first + per_payload), hashes_per_event)
            ]
            yield msgspec.msgpack.encode([1.0, events, 0])


class Part(msgspec.Struct, frozen=True):
    """The blocks 0 to ``blocks`` of a chain, held by a pod."""

    pod: int
    chain: int
    blocks: int


class Fleet(msgspec.Struct, frozen=True):
    """What a fleet holds.

    ``unique``: every chain lies on one pod. ``same``: every chain lies on all pods. ``depths``: every chain lies on all pods,
    on each to a different depth (which pod holds most changes from chain to chain).
    """

    chains: int
    pods: int
    shared: Literal["unique", "same", "depths"] = "unique"
    first_chain: int = 0

    def parts(self) -> Iterator[Part]:
        for chain in range(self.first_chain, self.first_chain + self.chains):
            if self.shared == "unique":
                yield Part(chain % self.pods, chain, CHAIN_BLOCKS)
                continue
            for pod in range(self.pods):
                depth = CHAIN_BLOCKS
                if self.shared == "depths":
                    depth = max(1, ((pod + chain) % self.pods + 1) * CHAIN_BLOCKS // self.pods)
                yield Part(pod, chain, depth)

    @property
    def entries(self) -> int:
        """(Pod, block) pairs."""
        return sum(part.blocks for part in self.parts())

    def prompts(self, count: int) -> list[int]:
        """Return chains to ask for, spread over the fleet's."""
        return [self.first_chain + index * self.chains // count for index in range(min(count, self.chains))]

    @classmethod
    def of_entries(cls, entries: int, pods: int, shared: Literal["unique", "same", "depths"] = "unique") -> Fleet:
        """Return a fleet with about so many entries."""
        chain_entries = {"unique": CHAIN_BLOCKS, "same": CHAIN_BLOCKS * pods, "depths": CHAIN_BLOCKS * (pods + 1) // 2}
        return cls(max(1, round(entries / chain_entries[shared])), pods, shared)
