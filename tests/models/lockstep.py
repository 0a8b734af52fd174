"""Two indexes that get the same steps, compared after each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from kvatlas.index import Index, IndexLimits, ReferenceIndex
from kvatlas.index.native import NativeIndex
from kvatlas.keys import KeyRecipe
from kvatlas.types import BlockKey, BlockStored, EngineHash, EventBatch, Lookup, PodId, Stream
from tests.models.steps import SCHEMA, Step


class Lockstep:
    """The reference and the native index at one clock."""

    def __init__(self, limits: IndexLimits, *, schema: KeyRecipe = SCHEMA, looking: bool = False) -> None:
        """``looking``: all blocks are looked up after every step. Else only at the end: a lookup makes a new order of use."""
        self.now_s = 0.0
        self.schema = schema
        self.reference = ReferenceIndex(schema, limits, lambda: self.now_s)
        self.native = NativeIndex(schema, limits, lambda: self.now_s)
        self.looking = looking
        self.keys: dict[BlockKey, None] = {}
        """All that were ever held or promised."""
        self.filled = 0

    def follow(self, steps: Iterable[Step]) -> None:
        for name, *arguments in steps:
            getattr(self, name)(*arguments)
            self.compare()
        self.look_at_all()

    # -- steps --------------------------------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        self.now_s += seconds

    def apply(self, stream: Stream, batch: EventBatch) -> None:
        self.both(lambda index: index.apply(stream, batch))

    def promise(self, stream: Stream, keys: Sequence[BlockKey], ttl_s: float) -> None:
        self.keys.update(dict.fromkeys(keys))
        self.both(lambda index: index.promise(stream, keys, ttl_s))

    def mark(self, stream: Stream, stale: Any) -> None:
        self.both(lambda index: index.mark(stream, stale))

    def drop(self, stream: Stream) -> None:
        self.both(lambda index: index.drop(stream))

    def forget(self, stream: Stream) -> None:
        self.both(lambda index: index.forget(stream))

    def expire(self) -> None:
        self.both(lambda index: index.expire())

    def lookup(self, keys: Sequence[BlockKey], pods: Sequence[PodId] | None = None) -> None:
        self.both(lambda index: readable(index.lookup(keys, pods)))

    def fill(self, stream: Stream, count: int) -> None:
        """Store blocks that nobody asks for: others must go."""
        size = self.schema.block_size_tokens
        tokens = array("I", range(1000 + self.filled, 1000 + self.filled + count * size))
        hashes = tuple(EngineHash(1_000_000 + self.filled + block) for block in range(count))
        self.filled += count * size
        self.apply(stream, EventBatch((BlockStored(hashes, None, tokens, size),)))

    # -- comparing ----------------------------------------------------------------------------------------------------

    def both(self, ask: Callable[[Index], Any]) -> None:
        expected, answer = ask(self.reference), ask(self.native)
        assert answer == expected

    def compare(self) -> None:
        """Compare what can be asked without a trace, or (looking) all."""
        self.both(lambda index: index.streams())
        self.both(lambda index: msgspec.structs.replace(index.stats(), bytes_estimated=0))
        self.keys.update(dict.fromkeys(self.reference._holders))
        if self.looking:
            self.look_at_all()

    def look_at_all(self) -> None:
        self.lookup(list(self.keys))
        self.compare_sizes()

    def compare_sizes(self) -> None:
        self.both(lambda index: msgspec.structs.replace(index.stats(), bytes_estimated=0))


def readable(lookup: Lookup) -> tuple[object, ...]:
    return (
        list(lookup.keys),
        [dict(slots) for slots in lookup.holders],
        [set(streams) for streams in lookup.speculative],
        dict(lookup.streams),
    )
