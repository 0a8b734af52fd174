"""Random steps for an index: events of several engines, promises, questions, and time going by.

Each step is a value that says all of itself, so a failing run prints as a list that can be pasted into a test.
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from hypothesis import strategies as st

from kvatlas.index import IndexLimits
from kvatlas.keys import EngineKeys, HashScheme, KeyRecipe, KeySchema, LlmdKeys
from kvatlas.types import (
    AllBlocksCleared,
    AttentionKind,
    BlockKey,
    BlockRemoved,
    BlockStored,
    DpRank,
    EngineHash,
    Event,
    EventBatch,
    Extra,
    GroupIdx,
    GroupSpec,
    PodId,
    StaleReason,
    Stream,
    Tier,
)

Step = tuple[object, ...]
"""A method of :class:`tests.models.lockstep.Lockstep`, and its arguments."""

Pick = Callable[[int], int]
"""Returns an integer from 0 to below the given one: the only source of chance."""

T = TypeVar("T")

EXAMPLES_FACTOR = int(os.environ.get("KVATLAS_EXAMPLES_FACTOR", "1"))
"""For long runs by hand: so many times the examples."""

SCHEMA = KeySchema(4)
SCHEMAS: dict[str, KeyRecipe] = {
    "kvatlas": SCHEMA,
    "engine": EngineKeys(HashScheme("sha256_cbor", "0"), 4),
    "llmd-cbor-fnv": LlmdKeys(4, "0"),
    "llmd-xxh64": LlmdKeys(4, "0", "llmd-xxh64"),
}
STREAMS = [
    Stream(PodId("a")),
    Stream(PodId("a"), DpRank(1)),
    Stream(PodId("b")),
    Stream(PodId("c")),
]
STRANGER = Stream(PodId("z"), DpRank(7))
"""Promised to, never heard of."""
NAMES = ["m", "m", "m", "n", None, "", "m"]
ADAPTERS = [None, None, None, None, "a", "b", "m", ""]
"""An adapter that is named as a model shares its keys."""
TIERS = [Tier("gpu"), Tier("gpu"), Tier("cpu"), Tier("disk"), Tier("odd")]
KINDS = list(AttentionKind)


class Engines(msgspec.Struct, frozen=True):
    """How the engines of a run behave."""

    sizes: tuple[int, ...]
    """Their block sizes, each event's its own."""
    hashing: str = "orderly"
    """How they name blocks: ``orderly``, by all that they hold; ``by prefix``, by tokens only; ``few``, nearly at random."""
    prompt_tokens: int = 24
    schema: KeyRecipe = SCHEMA
    """The index's."""


def one_of(pick: Pick, values: Sequence[T]) -> T:
    return values[pick(len(values))]


def prompt_of(number: int, length: int) -> tuple[int, ...]:
    """Prompts share prefixes often: each quarter is all zeros or all ones."""
    return tuple(int(bit) for bit in f"{number:04b}" for _ in range(length // 4))


def extras_of(flavour: int, start: int, size: int) -> tuple[Extra, ...]:
    """What the block at ``start`` depends on. Flavour 2 names also what is in the blocks beside it: the keys are those of 1."""
    if flavour == 0:
        return ()
    known = [(0, "salt", b"s"), (5, "mm", b"i"), (5, "opaque", b"x"), (13, "mm", b"j")]
    here = [Extra(at - start, kind, value) for at, kind, value in known if start <= at < start + size]
    if flavour == 2:
        here += [Extra(-1, "mm", b"before"), Extra(size, "mm", b"behind")]
    return tuple(here)


def keys_of(engines: Engines, number: int, flavour: int, root: str) -> list[BlockKey]:
    """The keys of a prompt. Where they are engine hashes: as stream "a" names its blocks, or some that do not exist."""
    prompt = prompt_of(number, engines.prompt_tokens)
    schema = engines.schema
    if isinstance(schema, EngineKeys):
        if engines.hashing == "few":
            return [BlockKey(hash_) for hash_ in range(8)]
        size = schema.block_size_tokens
        more = (size, flavour, None) if engines.hashing == "orderly" else ()
        named = [(prompt[:end], *more) for end in range(size, len(prompt) + 1, size)]
        return [BlockKey(zlib.crc32(repr(name).encode())) for name in named]
    tokens = array("I", prompt)
    return schema.extend(schema.root(root), tokens, extras_of(min(flavour, 1), 0, len(tokens)))[0]


class Blocks:
    """Consecutive engine blocks of a prompt, as one engine names them."""

    def __init__(self, pick: Pick, engines: Engines, stream: Stream) -> None:
        self.size = one_of(pick, engines.sizes)
        self.prompt = prompt_of(pick(16), engines.prompt_tokens)
        self.flavour = max(0, pick(8) - 5)
        self.adapter = one_of(pick, ADAPTERS)
        count = len(self.prompt) // self.size
        first = pick(count)
        last = min(count, first + 1 + pick(count))
        if pick(3) == 0:
            first = 0
        self._pick, self._hashing, self._stream = pick, engines.hashing, stream
        self.first = first
        self.hashes = [self._hash(block) for block in range(first, last)]
        self.parent = self._hash(first - 1) if first else None
        self.tokens = array("I", self.prompt[first * self.size : last * self.size])

    def _hash(self, block: int) -> EngineHash:
        if self._hashing == "few":
            return EngineHash(self._pick(8))
        prefix = self.prompt[: (block + 1) * self.size]
        if self._stream.pod == "b":  # names its blocks as others name other blocks
            prefix = tuple(1 - token for token in prefix)
        named: tuple[object, ...] = (prefix,)
        if self._hashing == "orderly":
            named = (prefix, self.size, self.flavour, self.adapter)
        seed = b"other" if self._stream.pod == "c" else b""
        return EngineHash(zlib.crc32(repr(named).encode() + seed))

    def extras(self) -> tuple[tuple[Extra, ...], ...] | None:
        if self.flavour == 0:
            return None
        starts = [(self.first + i) * self.size for i in range(len(self.hashes))]
        return tuple(extras_of(self.flavour, start, self.size) for start in starts)


def spec_of(pick: Pick, size: int) -> GroupSpec | None:
    if pick(2):
        return None
    windows = [None, 1, 2, 5, 9, 100]
    return GroupSpec(one_of(pick, KINDS), one_of(pick, windows), one_of(pick, [None, size, size, 2, 8, 3]))


def stored(pick: Pick, engines: Engines, stream: Stream) -> BlockStored:
    blocks = Blocks(pick, engines, stream)
    tier, group = one_of(pick, TIERS), GroupIdx(max(0, pick(6) - 3))
    spec = spec_of(pick, blocks.size) if pick(3) == 0 else None
    form = pick(12)
    if form == 0:  # placeholder: hashes only
        return BlockStored(tuple(blocks.hashes), tier=one_of(pick, TIERS[2:]), group=group, spec=spec)
    if form == 1:  # a placeholder that says some twice
        again = [one_of(pick, blocks.hashes) for _ in range(3)]
        return BlockStored((*blocks.hashes, *again), tier=tier, group=group)
    hashes, extras = blocks.hashes, blocks.extras()
    tokens, parent, size = blocks.tokens, blocks.parent, blocks.size
    if form == 2:  # a sliding window lists only what it keeps
        kept = 1 + pick(len(hashes))
        hashes, extras = hashes[-kept:], extras and extras[-kept:]
    elif form == 3:
        parent = one_of(pick, [None, EngineHash(1), EngineHash(7)])
    elif form == 4:
        tokens = tokens + array("I", range(pick(size)))  # the beginning of a block that has no hash
    elif form == 5:
        size = 0
    return BlockStored(
        tuple(hashes),
        parent,
        tokens,
        size or one_of(pick, [None, 0]),
        tier,
        group,
        spec,
        lora_name=blocks.adapter,
        extras=extras,
    )


def removed(pick: Pick, engines: Engines, stream: Stream) -> BlockRemoved:
    hashes = Blocks(pick, engines, stream).hashes
    if pick(3) == 0:
        hashes = [*hashes, EngineHash(1), one_of(pick, hashes)]
    return BlockRemoved(tuple(hashes), one_of(pick, TIERS), one_of(pick, [None, None, GroupIdx(0), GroupIdx(1), GroupIdx(2)]))


def event(pick: Pick, engines: Engines, stream: Stream) -> Event:
    kind = pick(12)
    if kind < 8:
        return stored(pick, engines, stream)
    if kind < 11:
        return removed(pick, engines, stream)
    return AllBlocksCleared(one_of(pick, [None, *TIERS[1:]]))


def batch(pick: Pick, engines: Engines, stream: Stream) -> EventBatch:
    events = tuple(event(pick, engines, stream) for _ in range(1 + max(0, pick(5) - 2)))
    return EventBatch(events, one_of(pick, [None, 0.0, 1.5, 2.5]), model=one_of(pick, NAMES))


def some_keys(pick: Pick, engines: Engines) -> list[BlockKey]:
    keys = keys_of(engines, pick(16), max(0, pick(4) - 2), one_of(pick, ["m", "m", "m", "n", "a", "b", ""]))
    first = max(0, pick(8) - 4)
    return keys[first : first + 1 + pick(len(keys))]


def some_pods(pick: Pick) -> list[PodId] | None:
    return one_of(pick, [None, None, [], [PodId("a")], [PodId("a"), PodId("c")], [PodId("b"), PodId("z")]])


def step(pick: Pick, engines: Engines) -> Step:
    """One step: mostly events."""
    stream = one_of(pick, STREAMS)
    kind = pick(32)
    if kind < 20:
        return ("apply", stream, batch(pick, engines, stream))
    if kind < 23:
        return ("promise", one_of(pick, [*STREAMS, STRANGER]), some_keys(pick, engines), one_of(pick, [0.0, 1.0, 3.0, 9.0]))
    if kind < 26:
        return ("advance", one_of(pick, [1.0, 3.0, 7.0]))
    if kind < 29:
        keys = some_keys(pick, engines)
        if pick(3) == 0:
            keys = [*keys, *keys[:2], *some_keys(pick, engines)]
        return ("lookup", keys, some_pods(pick))
    others: list[Step] = [
        ("mark", one_of(pick, [*STREAMS, STRANGER]), one_of(pick, [None, *StaleReason])),
        (one_of(pick, ["drop", "forget"]), one_of(pick, [*STREAMS, STRANGER])),
        ("fill", stream, one_of(pick, [1, 2, 5, 40])),
        ("expire",),
    ]
    return one_of(pick, others)


def limits(pick: Pick) -> IndexLimits:
    many = 100_000
    return IndexLimits(
        ttl_s=one_of(pick, [1e6, 7.0, 12.0]),
        blocks_max=one_of(pick, [many, 3, 8, 30]),
        bytes_max=1 << 40,
        orphans_max=one_of(pick, [many, 2, 4, 6]),
        retired_max=one_of(pick, [many, 2, 3, 8]),
        promises_max=one_of(pick, [many, 3, 6]),
    )


def picking(draw: st.DrawFn) -> Pick:
    """Let Hypothesis choose."""
    return lambda below: draw(st.integers(0, below - 1))


@st.composite
def runs(draw: st.DrawFn, engines: Engines, steps_max: int = 25) -> tuple[IndexLimits, list[Step]]:
    """Limits, and steps."""
    pick = picking(draw)
    return limits(pick), [step(pick, engines) for _ in range(draw(st.integers(1, steps_max)))]
