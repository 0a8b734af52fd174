"""An engine's memory in blocks: the GPU's, which jobs share, and the tiers below it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

NULL_BLOCK = 0
"""vLLM keeps one block for its own: nobody gets it."""


class BlockPool:
    """The GPU's blocks, as vLLM 0.32 keeps them (v1/core/block_pool.py).

    A block is free while no job uses it. It keeps its key, and may be used again by who asks for the key, until it is taken for
    something else: free blocks wait for that in a queue, the next one first. One key can have several blocks, because two jobs
    computed the same at a time, or one computed its last block anew: then the oldest of them is found.
    """

    def __init__(self, blocks: int) -> None:
        """``blocks`` with the one that is never used."""
        self.users = [0] * blocks
        """How many jobs use each block."""
        self.key: list[int | None] = [None] * blocks
        self.found: dict[int, list[int]] = {}
        """Key -> the blocks that have it, the oldest first."""
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(NULL_BLOCK + 1, blocks))
        """Blocks that nobody uses, the next to be taken first."""
        self.cached = 0
        """Blocks with a key, used or free."""

    @property
    def used(self) -> int:
        """Blocks that jobs use."""
        return len(self.users) - 1 - len(self.free)

    def prefix(self, keys: Sequence[int], blocks_max: int) -> list[int]:
        """Return the blocks of the leading keys that are held, up to the first gap."""
        blocks = []
        for key in islice(keys, blocks_max):
            copies = self.found.get(key)
            if copies is None:
                break
            blocks.append(copies[0])
        return blocks

    def unused(self, blocks: Sequence[int]) -> int:
        """Count those of some blocks that would leave the queue of free ones if they were used."""
        return sum(not self.users[block] for block in blocks)

    def use(self, blocks: Sequence[int]) -> None:
        """Count one more job in for each of these blocks, which have a key."""
        for block in blocks:
            if not self.users[block]:
                del self.free[block]
            self.users[block] += 1

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Return so many blocks for one job, and the keys that they lost by that. KeyError where fewer are free."""
        blocks, lost = [], []
        for _ in range(count):
            block, _ = self.free.popitem(last=False)
            self.users[block] = 1
            blocks.append(block)
            key = self.key[block]
            if key is not None:
                self._forget(block, key)
                lost.append(key)
        return blocks, lost

    def name(self, block: int, key: int) -> None:
        """Let a block that is in use, and has no key, be found by one."""
        self.key[block] = key
        self.found.setdefault(key, []).append(block)
        self.cached += 1

    def leave(self, blocks: Sequence[int]) -> None:
        """Count a job out, given its blocks from the first to the last.

        Its last block is to be taken first, because it is of use only together with those before it; blocks without a key are
        of no use, and are taken before all others.
        """
        nameless = []
        for block in reversed(blocks):
            self.users[block] -= 1
            if not self.users[block]:
                if self.key[block] is None:
                    nameless.append(block)
                else:
                    self.free[block] = None
        for block in reversed(nameless):
            self.free[block] = None
            self.free.move_to_end(block, last=False)

    def reset(self) -> None:
        """Forget all keys. The order of free blocks stays."""
        self.found.clear()
        self.cached = 0
        self.key = [None] * len(self.key)

    def _forget(self, block: int, key: int) -> None:
        self.key[block] = None
        self.cached -= 1
        copies = self.found[key]
        copies.remove(block)
        if not copies:
            del self.found[key]


class Tier:
    """Memory below the GPU's: keys in the order of their use. What is loaded from it stays in it."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.keys: OrderedDict[int, None] = OrderedDict()
        """The least recently used first."""

    def touch(self, keys: Sequence[int]) -> None:
        """Note that a prompt with these keys came: those that are here were used, the first of them last."""
        for key in reversed(keys):
            if key in self.keys:
                self.keys.move_to_end(key)

    def store(self, keys: Sequence[int]) -> tuple[list[int], list[int]]:
        """Write blocks. Return the positions of those that are new here, and the keys that had to go for them.

        No more than there is room for altogether, and of those the first.
        """
        new = [i for i, key in enumerate(keys) if key not in self.keys][: self.blocks]
        lost = [self.keys.popitem(last=False)[0] for _ in range(len(self.keys) + len(new) - self.blocks)]
        for i in reversed(new):
            self.keys[keys[i]] = None
        return new, lost
