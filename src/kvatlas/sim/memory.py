"""What an engine does with its memory for a job: find, take and name blocks on the GPU, and write them to the tiers below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from kvatlas.sim.blocks import BlockPool, Tier
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.work import Told, Work


class Memory:
    """All of one engine's memory."""

    def __init__(self, spec: EngineSpec, told: Told) -> None:
        self.gpu = BlockPool(spec.gpu_blocks)
        self.tiers = [Tier(tier.blocks) for tier in spec.tiers]
        self._spec = spec
        self._told = told

    def lookup(self, work: Work) -> tuple[list[int], list[int]]:
        """Return the blocks on the GPU that a job without any begins with, and for each of its next ones the tier that has it.

        Never all of its tokens: the last one must be computed for the next one to be known.
        """
        if not self._spec.prefix_caching:
            return [], []
        keys, blocks_max = work.job.keys, (work.tokens - 1) // self._spec.block_size_tokens
        hits = self.gpu.prefix(keys, blocks_max)
        sources = []
        for key in islice(keys, len(hits), blocks_max):
            source = next((number for number, tier in enumerate(self.tiers) if key in tier.keys), None)
            if source is None:
                break
            sources.append(source)
        return hits, sources

    def use(self, work: Work, hits: list[int]) -> None:
        """Give a job without blocks those that were found for it."""
        self.gpu.use(hits)
        work.blocks = hits
        work.named = len(hits)
        work.computed = len(hits) * self._spec.block_size_tokens
        if not work.started:
            work.cached = work.computed
        self._touch(work)

    def take(self, work: Work, count: int, at_s: float) -> None:
        """Give a job free blocks. KeyError where there are fewer."""
        taken, lost = self.gpu.take(count)
        work.blocks += taken
        self._told.removed(at_s, lost)

    def name(self, work: Work, tokens: int, at_s: float) -> None:
        """Let those of a job's blocks be found that so many tokens fill, and write them to all tiers that lack them."""
        full = tokens // self._spec.block_size_tokens
        if full <= work.named or not self._spec.prefix_caching:
            return
        first, work.named = work.named, full
        keys = work.job.keys[first:full]
        for block, key in zip(work.blocks[first:full], keys, strict=True):
            self.gpu.name(block, key)
        self._told.stored(at_s, work, first, full - first)
        for number, tier in enumerate(self.tiers, 1):
            new, lost = tier.store(keys)
            self._told.removed(at_s, lost, number)
            for begin, many in _runs(new):
                self._told.stored(at_s, work, first + begin, many, number)

    def leave(self, work: Work, *, used: bool = False) -> None:
        """Take a job's blocks away. ``used``: they served it to its end, which tiers note."""
        self.gpu.leave(work.blocks)
        if used:
            self._touch(work)

    def load_seconds(self, sources: Sequence[int]) -> float:
        """Return how long it takes to load blocks from the tiers that have them, one tier after the other."""
        seconds = 0.0
        for number, tier in enumerate(self._spec.tiers):
            if blocks := sources.count(number):
                seconds += tier.latency_s + blocks * tier.load_block_s
        return seconds

    def _touch(self, work: Work) -> None:
        keys = work.job.keys[: work.tokens // self._spec.block_size_tokens]
        for tier in self.tiers:
            tier.touch(keys)


def _runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where consecutive positions begin, and how many they are."""
    begin = 0
    for end in range(1, len(positions) + 1):
        if end == len(positions) or positions[end] != positions[end - 1] + 1:
            yield positions[begin], end - begin
            begin = end
