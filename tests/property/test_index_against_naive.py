"""Random event streams against a naive model: after every event the index answers what the model says."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.index import IndexLimits
from kvatlas.keys import KeySchema
from kvatlas.types import (
    CPU,
    GPU,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EngineHash,
    Event,
    EventBatch,
    GroupIdx,
    GroupSpec,
    PodId,
    Slot,
    Stream,
)
from tests.contract.implementations import IMPLEMENTATIONS, MakeIndex
from tests.models.naive import NaiveCache, Prefix

PROMPTS_TOKENS = 24
STREAM = Stream(PodId("pod"))
SIZES = [(4, 4), (8, 4), (4, 8), (4, 12), (6, 4), (4, 6)]
"""(engine block, index block): equal, one to many, many to one, and neither a multiple of the other."""


def hash_of(prefix: Prefix) -> EngineHash:
    return EngineHash(hash(prefix) & 0xFFFF_FFFF_FFFF_FFFF)


PROMPT = st.integers(0, 15).map(lambda n: tuple(int(b) for b in f"{n:04b}" for _ in range(PROMPTS_TOKENS // 4)))
"""Prompts share prefixes often: each quarter is all zeros or all ones."""

STORE = st.tuples(st.just("store"), PROMPT, st.integers(0, 5), st.integers(1, 6), st.integers(0, 1))
PLACEHOLDER = st.tuples(st.just("placeholder"), PROMPT, st.integers(0, 5))
REMOVE = st.tuples(st.just("remove"), PROMPT, st.integers(0, 5), st.integers(0, 1), st.booleans())
CLEAR = st.tuples(st.just("clear"), st.sampled_from([None, GPU, CPU]))


def events_of(op: tuple, model: NaiveCache) -> list[Event]:
    """Turn an operation into events, and tell the model."""
    size = model.engine_block
    if op[0] == "clear":
        model.clear(op[1] or GPU)
        return [AllBlocksCleared(op[1])]
    prompt = op[1]
    blocks = PROMPTS_TOKENS // size
    first = op[2] % blocks
    prefixes = [prompt[: (i + 1) * size] for i in range(first, min(blocks, first + (op[3] if op[0] == "store" else 1)))]
    hashes = tuple(hash_of(prefix) for prefix in prefixes)
    if op[0] == "placeholder":
        model.store(CPU, GroupIdx(0), prefixes[0])
        return [BlockStored(hashes, tier=CPU)]
    group = GroupIdx(op[4] if op[0] == "store" else op[3])
    if op[0] == "remove":
        tier = CPU if op[4] else GPU
        model.remove(tier, group, prefixes[0])
        return [BlockRemoved(hashes, tier, group)]
    for prefix in prefixes:
        model.store(GPU, group, prefix)
    parent = hash_of(prompt[: first * size]) if first else None
    tokens = array("I", prompt[first * size : (first + len(prefixes)) * size])
    return [BlockStored(hashes, parent, tokens, size, GPU, group, GroupSpec(block_size_tokens=size))]


def name_everything(size: int) -> EventBatch:
    """Events that name every block of every prompt and leave nothing behind: then nothing is an orphan."""
    events: list[Event] = []
    for n in range(16):
        prompt = tuple(int(b) for b in f"{n:04b}" for _ in range(PROMPTS_TOKENS // 4))
        hashes = tuple(hash_of(prompt[: (i + 1) * size]) for i in range(PROMPTS_TOKENS // size))
        tokens = array("I", prompt[: len(hashes) * size])
        events.append(BlockStored(hashes, None, tokens, size, GPU, GroupIdx(9)))
        events.append(BlockRemoved(hashes, GPU, GroupIdx(9)))
    return EventBatch(tuple(events), model="m")


@pytest.mark.parametrize("make", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize(("engine_block", "index_block"), SIZES)
@settings(max_examples=60, deadline=None)
@given(ops=st.lists(st.one_of(STORE, STORE, PLACEHOLDER, REMOVE, CLEAR), max_size=25), named_first=st.booleans())
def test_copies_equal_the_naive_models(
    make: MakeIndex, engine_block: int, index_block: int, ops: list[tuple], named_first: bool
) -> None:
    """Whether blocks are named before or after they are stored, in any order, the same copies are found at the end."""
    schema = KeySchema(index_block)
    index = make(schema, IndexLimits(), lambda: 0.0)
    model = NaiveCache(engine_block, index_block)
    if named_first:
        index.apply(STREAM, name_everything(engine_block))
    for op in ops:
        index.apply(STREAM, EventBatch(tuple(events_of(op, model)), model="m"))
        if named_first:
            check(index, schema, model)
    index.apply(STREAM, name_everything(engine_block))
    check(index, schema, model)
    assert index.stats().orphans == 0


def check(index: object, schema: KeySchema, model: NaiveCache) -> None:
    assert index.stats().orphans == 0  # what is compared here is named
    entries = set()
    for n in range(16):
        prompt = tuple(int(b) for b in f"{n:04b}" for _ in range(PROMPTS_TOKENS // 4))
        keys = schema.keys(array("I", prompt), "m")
        lookup = index.lookup(keys)
        for block, (key, slots) in enumerate(zip(keys, lookup.holders, strict=True)):
            expected = {Slot(STREAM, *place): copies for place, copies in model.copies_of(prompt, block).items()}
            assert slots == expected, (prompt, block)
            entries |= {(key, slot) for slot in slots}
    assert index.stats().entries == len(entries)


@pytest.mark.parametrize("make", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@settings(max_examples=50, deadline=None)
@given(ops=st.lists(STORE, min_size=1, max_size=12), order=st.randoms(use_true_random=False))
def test_stores_may_come_in_any_order(make: MakeIndex, ops: list[tuple], order: object) -> None:
    """Children before their parents wait as orphans and are adopted: the outcome does not depend on the order."""
    schema = KeySchema(4)
    model = NaiveCache(4, 4)
    batches = [EventBatch(tuple(events_of(op, model)), model="m") for op in ops]
    order.shuffle(batches)
    index = make(schema, IndexLimits(), lambda: 0.0)
    for batch in batches:
        index.apply(STREAM, batch)
    index.apply(STREAM, name_everything(4))
    check(index, schema, model)
