"""Snapshots of the native index: what is refused and why, what a restored index keeps to."""

from __future__ import annotations

import struct
from array import array

import msgspec
import pytest
import xxhash

pytest.importorskip("kvatlas._native")

from kvatlas.errors import SnapshotError
from kvatlas.index import IndexLimits
from kvatlas.index.native import NativeIndex
from kvatlas.keys import EngineKeys, HashScheme, KeyRecipe, KeySchema, LlmdKeys
from kvatlas.types import (
    BlockRemoved,
    BlockStored,
    EngineHash,
    EventBatch,
    Extra,
    IndexStats,
    PodId,
    StaleReason,
    Stream,
    Tier,
)

SCHEMA = KeySchema(4, seed="s")
A = Stream(PodId("a"))
B = Stream(PodId("b"))


def empty(limits: IndexLimits | None = None, schema: KeyRecipe = SCHEMA) -> NativeIndex:
    return NativeIndex(schema, limits, lambda: 5.0)


def filled() -> NativeIndex:
    """Return an index with several names of a key, blocks of other sizes, orphans, tiers, extras and retired blocks."""
    index = empty()
    tokens = array("I", range(8))
    salted = ((Extra(0, "salt", b"x"),), ())
    events = (
        BlockStored(hashes(1, 2), None, tokens, 4),
        BlockStored(hashes(3), None, tokens, 8),
        BlockStored(hashes(4, 5), None, tokens, 4, Tier("cpu"), extras=salted),
        BlockStored(hashes(6), None, tokens[:2], 2),
        BlockStored(hashes(7), EngineHash(99), tokens[:4], 4),
        BlockStored(hashes(8)),
        BlockRemoved(hashes(2)),
    )
    index.apply(A, EventBatch(events, 1.5, model="m"))
    index.apply(B, EventBatch((BlockStored(hashes(11, 12), None, tokens, 4),), model="m"))
    index.mark(B, StaleReason.RESYNCING)
    return index


def hashes(*numbers: int) -> tuple[EngineHash, ...]:
    return tuple(map(EngineHash, numbers))


def sizes(index: NativeIndex) -> IndexStats:
    return msgspec.structs.replace(index.stats(), bytes_estimated=0)


def sealed(snapshot: bytes) -> bytes:
    """Make the checksum right again."""
    return snapshot[:-8] + struct.pack("<Q", xxhash.xxh3_64_intdigest(snapshot[:-8]))


def test_a_restored_index_answers_as_the_original() -> None:
    index, restored = filled(), empty()
    restored.restore(index.snapshot())
    keys = SCHEMA.keys(array("I", range(8)), "m")
    assert restored.streams() == index.streams()
    assert sizes(restored) == sizes(index)
    assert restored.lookup(keys).holders == index.lookup(keys).holders


def test_an_empty_index_can_be_restored() -> None:
    restored = empty()
    restored.restore(empty().snapshot())
    restored.restore(filled().snapshot())  # still no stream was known
    assert len(restored.streams()) == 2


def test_only_an_index_that_knows_no_stream_can_be_restored() -> None:
    index = filled()
    before = sizes(index)
    with pytest.raises(SnapshotError, match="not empty; restore before anything is applied"):
        index.restore(empty().snapshot())
    assert sizes(index) == before


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        (KeySchema(8, seed="s"), "block_size_tokens: 4 in the snapshot, 8 in the index"),
        (KeySchema(4, seed="other"), 'seed: "s" in the snapshot, "other" in the index'),
        (LlmdKeys(4, "s"), "mode: kvatlas in the snapshot, llmd-cbor-fnv in the index"),
        (EngineKeys(HashScheme("sha256", "s"), 4), "mode: kvatlas in the snapshot, engine sha256 in the index"),
    ],
)
def test_the_schema_must_be_the_same(schema: KeyRecipe, problem: str) -> None:
    with pytest.raises(SnapshotError) as refused:
        empty(schema=schema).restore(filled().snapshot())
    assert refused.value.problem == problem
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (SCHEMA, "mode: engine sha256_cbor in the snapshot, kvatlas in the index"),
        (
            EngineKeys(HashScheme("xxhash_cbor", "s"), 4),
            "mode: engine sha256_cbor in the snapshot, engine xxhash_cbor in the index",
        ),
        (EngineKeys(HashScheme("sha256_cbor", "t"), 4), 'seed: "s" in the snapshot, "t" in the index'),
        (LlmdKeys(4, "s", "llmd-xxh64"), "mode: engine sha256_cbor in the snapshot, llmd-xxh64 in the index"),
    ],
)
def test_a_snapshot_of_engine_hashes_is_for_the_same_algorithm_and_seed(other: KeyRecipe, problem: str) -> None:
    original = empty(schema=EngineKeys(HashScheme("sha256_cbor", "s"), 4, {"sql": "/sql"}))
    original.apply(Stream(PodId("a")), EventBatch((BlockStored((EngineHash(7),)),)))
    with pytest.raises(SnapshotError) as refused:
        empty(schema=other).restore(original.snapshot())
    assert refused.value.problem == problem
    restored = empty(schema=EngineKeys(HashScheme("sha256_cbor", "s"), 4))
    restored.restore(original.snapshot())
    assert restored.stats().blocks == 1


def test_a_version_to_come_is_named() -> None:
    snapshot = bytearray(filled().snapshot())
    snapshot[8] = 2
    with pytest.raises(SnapshotError, match="version 2, flags 0; known: version 1"):
        empty().restore(sealed(bytes(snapshot)))


def test_something_else_is_no_snapshot() -> None:
    for other in (b"", b"KVATLAS", b"PK\3\4" + bytes(100)):
        with pytest.raises(SnapshotError, match="not a snapshot of kvatlas; pass what snapshot"):
            empty().restore(other)


def test_a_snapshot_that_was_cut_anywhere_is_refused() -> None:
    snapshot, index = filled().snapshot(), empty()
    for length in range(len(snapshot)):
        with pytest.raises(SnapshotError):
            index.restore(snapshot[:length])
        if length >= 20:
            with pytest.raises(SnapshotError):
                index.restore(sealed(snapshot[:length]))
    assert sizes(index) == sizes(empty())
    index.restore(snapshot)


def test_a_flipped_bit_is_noticed() -> None:
    snapshot, index = filled().snapshot(), empty()
    for at in range(len(snapshot)):
        changed = bytearray(snapshot)
        changed[at] ^= 1 << at % 8
        with pytest.raises(SnapshotError):
            index.restore(bytes(changed))
    assert sizes(index) == sizes(empty())


def test_a_change_with_a_right_checksum_does_no_harm() -> None:
    """It is refused with a reason, or what it says is taken: then all of it goes with its streams."""
    snapshot = filled().snapshot()
    refused = 0
    for at in range(12, len(snapshot) - 8):
        for value in (0, 1, 127, 255, snapshot[at] ^ 1):
            changed = bytearray(snapshot)
            changed[at] = value
            index = empty()
            try:
                index.restore(sealed(bytes(changed)))
            except SnapshotError as error:
                refused += 1
                assert error.problem  # noqa: PT017
                assert index.stats().streams == 0
                continue
            for stream in index.streams():
                index.apply(stream, EventBatch((BlockStored(hashes(1, 3, 6)), BlockRemoved(hashes(11, 2, 8)))))
                index.forget(stream)
            assert (index.stats().entries, index.stats().blocks, index.stats().orphans) == (0, 0, 0)
    assert refused > 100


def test_bounds_hold_at_once() -> None:
    """The least recently used blocks go, as if they had come one by one."""
    index, tokens = empty(), array("I", range(40))
    index.apply(A, EventBatch((BlockStored(hashes(*range(1, 11)), None, tokens, 4),), model="m"))
    restored = empty(IndexLimits(blocks_max=3))
    restored.restore(index.snapshot())
    held = restored.lookup(SCHEMA.keys(tokens, "m")).holders
    assert [bool(slots) for slots in held] == [True] * 3 + [False] * 7
    assert restored.stats().evicted_size == 7


def test_promises_are_not_in_it_and_those_made_since_stay() -> None:
    index, restored = filled(), empty()
    index.promise(A, SCHEMA.keys(array("I", range(100, 104)), "m"), 1.0)
    restored.promise(B, SCHEMA.keys(array("I", range(200, 208)), "m"), 1.0)
    restored.restore(index.snapshot())
    assert restored.stats().speculative == 2


def test_a_long_prompt_takes_little_more_than_its_keys_and_hashes() -> None:
    index = empty()
    numbers = hashes(*range(1, 4097))
    index.apply(A, EventBatch((BlockStored(numbers, None, array("I", range(4 * 4096)), 4),), model="m"))
    assert len(index.snapshot()) < 16 * 4096 + 200
