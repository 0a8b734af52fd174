"""A small engine with a prefix cache that keeps vLLM's rules and publishes vLLM's events. It knows its own truth.

Blocks are cached when full; a prompt hits its longest cached prefix but never its last token; a fully cached, aligned prompt
computes its last block again and announces it (a second copy); eviction takes the least recently used copy and removes it;
a reset empties the cache and is announced with the next frame only.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence

import msgspec
import xxhash

from kvatlas.types import Frame


class ModelEngine:
    def __init__(self, *, pod: str = "10.0.0.1:8000", model: str = "m", block_size: int = 4, capacity: int = 12) -> None:
        self.pod = pod
        self.model = model
        self.block_size = block_size
        self.capacity = capacity
        self.clock_s = 1_000.0
        self.process = 0
        self.replay_buffer_frames = 10_000
        self.replay_loses: set[int] = set()
        """Frames that the engine's socket drops from the next replay (once)."""
        self.replay_fails = 0
        """How many of the next replays are not answered."""
        self._start_process()

    def _start_process(self) -> None:
        self.frames: list[Frame] = []
        self.copies: OrderedDict[int, int] = OrderedDict()
        """Block hash -> copies, least recently used first."""
        self._reset_pending = False

    # -- what it does -------------------------------------------------------------------------------------------------

    def cached_tokens(self, prompt: Sequence[int]) -> int:
        """What the engine would report for a prompt now."""
        hit = 0
        for block in self._hashes(prompt)[: max(0, len(prompt) - 1) // self.block_size]:
            if block not in self.copies:
                break
            hit += 1
        return hit * self.block_size

    def request(self, prompt: Sequence[int]) -> None:
        """Serve a prompt: hit, evict, compute, cache, publish."""
        hashes = self._hashes(prompt)
        hit = self.cached_tokens(prompt) // self.block_size
        for block in reversed(hashes[:hit]):
            self.copies.move_to_end(block)
        events: list[object] = []
        if self._reset_pending:
            events.append({"type": "AllBlocksCleared"})
            self._reset_pending = False
        new = hashes[hit:]
        room = [block for block in self.copies if block not in hashes[:hit]]
        while sum(self.copies.values()) + len(new) > self.capacity and room:
            self._remove_copy(room[0], events)
            if room[0] not in self.copies:
                room.pop(0)
        new = new[: self.capacity - sum(self.copies.values())]
        for block in reversed(new):
            self.copies[block] = self.copies.get(block, 0) + 1
            self.copies.move_to_end(block)
        if new:
            start = hit * self.block_size
            events.append(
                {
                    "type": "BlockStored",
                    "block_hashes": new,
                    "parent_block_hash": hashes[hit - 1] if hit else None,
                    "token_ids": list(prompt[start : start + len(new) * self.block_size]),
                    "block_size": self.block_size,
                    "lora_id": None,
                    "medium": "GPU",
                    "lora_name": None,
                    "extra_keys": [None] * len(new),
                    "group_idx": 0,
                    "kv_cache_spec_kind": "full_attention",
                }
            )
        if events:
            self.publish(events)

    def _remove_copy(self, block: int, events: list[object]) -> None:
        events.append({"type": "BlockRemoved", "block_hashes": [block], "medium": "GPU", "group_idx": 0})
        self.copies[block] -= 1
        if not self.copies[block]:
            del self.copies[block]

    def reset(self) -> None:
        self.copies.clear()
        self._reset_pending = True

    def restart(self) -> None:
        self.process += 1
        self._start_process()

    def publish(self, events: list[object]) -> None:
        self.clock_s += 0.01
        payload = msgspec.msgpack.encode([self.clock_s, events, 0])
        self.frames.append(Frame(f"kv@{self.pod}@{self.model}", len(self.frames), payload, int(self.clock_s * 1e9)))

    def _hashes(self, prompt: Sequence[int]) -> list[int]:
        digest = self.process
        hashes = []
        for start in range(0, len(prompt) // self.block_size * self.block_size, self.block_size):
            tokens = prompt[start : start + self.block_size]
            digest = xxhash.xxh64_intdigest(struct.pack(f"<Q{len(tokens)}I", digest, *tokens))
            hashes.append(digest)
        return hashes

    # -- its replay endpoint ------------------------------------------------------------------------------------------

    async def replay(self, start_seq: int) -> AsyncGenerator[Frame, None]:
        if self.replay_fails:
            self.replay_fails -= 1
            raise TimeoutError
        lost, self.replay_loses = self.replay_loses, set()
        kept = [frame for frame in self.frames[-self.replay_buffer_frames :] if (frame.seq or 0) >= start_seq]
        for position, frame in enumerate(kept):
            if position < 2 or frame.seq not in lost:  # a socket drops when its queue is full, so never the first ones
                yield frame
