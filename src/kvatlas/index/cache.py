"""One engine's cache as its events tell it: engine hash <-> block keys, and copies by tier and group.

    stored event ─ names ─> EngineBlock(hash, chain end) ─ makes up ─> Chunk(key, hashes)
    copies[tier, group][hash] ─ the least over a chunk's hashes ─> copies of the key

Records live long and by the million, so none of them is a container that Python's garbage collector would walk (``gc=False``,
tuples instead of lists): none can be part of a cycle.

With equal block sizes a chunk is one hash. A larger index block needs several engine blocks (one chunk, many hashes); a larger
engine block makes up several keys (many chunks, one hash). Two hashes may make up the same key (an adapter's name re-pointed).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from kvatlas.keys import ChainEnd
from kvatlas.types import BlockKey, EngineHash, Extra, GroupIdx, GroupSpec, StaleReason, Stream, Tier

Place = tuple[Tier, GroupIdx]


class Chunk(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One way to have a block key: all of ``hashes`` held together."""

    key: BlockKey
    hashes: tuple[EngineHash, ...]


class EngineBlock(msgspec.Struct, eq=False, gc=False):
    """A block whose tokens are known."""

    end: ChainEnd
    unfinished: tuple[EngineHash, ...]
    """The engine blocks that hold ``end.pending``: the beginning of a larger index block."""
    chunks: tuple[Chunk, ...] = ()


class Orphan(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A block that waits for its parent, or (``tokens`` None) for any event that says what it holds."""

    parent: EngineHash | None = None
    tokens: array[int] | None = None
    extras: tuple[Extra, ...] = ()


class EngineCache:
    """The state of one stream. Plain containers; :class:`~kvatlas.index.reference.ReferenceIndex` keeps them consistent."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.model: str | None = None
        self.stale: StaleReason | None = None
        self.last_event_s: float | None = None
        self.groups: dict[GroupIdx, GroupSpec] = {}
        self.blocks: dict[EngineHash, EngineBlock] = {}
        self.copies: dict[Place, dict[EngineHash, int]] = {}
        self.places: dict[EngineHash, int] = {}
        """In how many places a hash is held."""
        self.chunks: dict[BlockKey, tuple[Chunk, ...]] = {}
        self.orphans: OrderedDict[EngineHash, Orphan] = OrderedDict()
        self.orphans_resident = 0
        """How many of the orphans are held: counted as they come and go, since every answer carries it."""
        self.children: dict[EngineHash, list[EngineHash]] = {}
        """Orphans by the parent they wait for."""
        self.retired_young: dict[EngineHash, None] = {}
        """Named blocks that are held nowhere. A child, or a lower tier, may still name them."""
        self.retired_old: dict[EngineHash, None] = {}
        """Those of the generation before."""

    def copies_of(self, place: Place, chunk: Chunk) -> int:
        """Return how many copies of a chunk's key a place has: as many as of its scarcest part."""
        held = self.copies.get(place)
        return min(held.get(part, 0) for part in chunk.hashes) if held else 0

    def has_parts(self, chunk: Chunk) -> bool:
        """Tell whether a chunk's parts are still what they were: none given up since, or named anew, or named twice."""
        *before, last = chunk.hashes
        known = (self.blocks.get(part) for part in before)
        unfinished = all(block is not None and block.end.pending for block in known)
        return unfinished and last in self.blocks and len(set(chunk.hashes)) == len(chunk.hashes)

    def stop_waiting(self, block: EngineHash, orphan: Orphan) -> None:
        """Take a block, which is an orphan no longer, out of those that wait for its parent."""
        if orphan.parent is None or orphan.parent not in self.children:
            return
        waiting = self.children[orphan.parent]
        waiting.remove(block)
        if not waiting:
            del self.children[orphan.parent]

    def recall(self, block: EngineHash) -> None:
        """Take a block out of the retired ones: it is held again, or given up."""
        self.retired_young.pop(block, None)
        self.retired_old.pop(block, None)

    def held_in(self, block: EngineHash) -> Iterator[Place]:
        """Yield the places that hold a block."""
        for place, held in self.copies.items():
            if block in held:
                yield place
