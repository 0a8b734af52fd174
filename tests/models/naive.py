"""What an index must answer, said in the most naive way: prefixes of tokens, counted."""

from __future__ import annotations

from collections import Counter

from kvatlas.types import GroupIdx, Tier

Prefix = tuple[int, ...]


class NaiveCache:
    """One stream. A held engine block is the whole token prefix that it ends."""

    def __init__(self, engine_block: int, index_block: int) -> None:
        self.engine_block = engine_block
        self.index_block = index_block
        self.copies: dict[tuple[Tier, GroupIdx], Counter[Prefix]] = {}

    def store(self, tier: Tier, group: GroupIdx, prefix: Prefix) -> None:
        self.copies.setdefault((tier, group), Counter())[prefix] += 1

    def remove(self, tier: Tier, group: GroupIdx, prefix: Prefix) -> None:
        held = self.copies.get((tier, group), Counter())
        if held[prefix] > 0:
            held[prefix] -= 1

    def clear(self, tier: Tier) -> None:
        for place in self.copies:
            if place[0] == tier:
                self.copies[place].clear()

    def copies_of(self, prompt: Prefix, block: int) -> dict[tuple[Tier, GroupIdx], int]:
        """Copies of index block ``block`` of a prompt, by place: all engine blocks that it overlaps are needed."""
        start, end = block * self.index_block, (block + 1) * self.index_block
        found = {}
        for place, held in self.copies.items():
            total = 0
            for prefix, count in held.items():
                ends_it = len(prefix) - self.engine_block < end <= len(prefix)
                if not count or not ends_it or prefix[:end] != prompt[:end]:
                    continue
                first = start // self.engine_block
                parts = [prefix[: (i + 1) * self.engine_block] for i in range(first, len(prefix) // self.engine_block)]
                total += min(held[part] for part in parts)
            if total:
                found[place] = total
        return found
