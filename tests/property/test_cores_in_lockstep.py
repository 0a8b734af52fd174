"""The native index does what the reference does: random steps on both; every report, answer and size is compared."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("kvatlas._native")

from kvatlas.index import Index, IndexLimits
from kvatlas.index.native import NativeIndex
from kvatlas.ingest.decode import load_decoder
from kvatlas.ingest.recording import read_frames
from kvatlas.keys import KeySchema
from kvatlas.types import (
    AllBlocksCleared,
    ApplyReport,
    BlockRemoved,
    BlockStored,
    DecodedPayload,
    DpRank,
    EngineHash,
    Event,
    EventBatch,
    PodId,
    Stream,
)
from tests.models.lockstep import Lockstep
from tests.models.steps import EXAMPLES_FACTOR, SCHEMA, SCHEMAS, Engines, keys_of, runs, step

ENGINES = {
    "index blocks": Engines((4,)),
    "index blocks by several names": Engines((4,), "by prefix"),
    "larger blocks": Engines((8, 12)),
    "smaller blocks": Engines((2, 1)),
    "mixed blocks": Engines((4, 4, 8, 2, 6, 3)),
    "mixed blocks by several names": Engines((4, 4, 8, 2, 6, 3), "by prefix"),
    "names at random": Engines((4,), "few"),
    "mixed blocks, names at random": Engines((4, 4, 8, 2, 6, 3), "few"),
}


@pytest.mark.parametrize("looking", [False, True], ids=["by effects", "looking"])
@pytest.mark.parametrize("engines", ENGINES.values(), ids=ENGINES)
@settings(max_examples=60 * EXAMPLES_FACTOR, deadline=None)
@given(data=st.data())
def test_equal_after_every_step(engines: Engines, looking: bool, data: st.DataObject) -> None:
    limits, steps = data.draw(runs(engines))
    Lockstep(limits, looking=looking).follow(steps)


@pytest.mark.parametrize("looking", [False, True], ids=["by effects", "looking"])
@pytest.mark.parametrize("engines", [name for name in ENGINES if "larger" not in name and "smaller" not in name])
@pytest.mark.parametrize("mode", [mode for mode in SCHEMAS if mode != "kvatlas"])
@settings(max_examples=40 * EXAMPLES_FACTOR, deadline=None)
@given(data=st.data())
def test_equal_after_every_step_with_keys_of_other_kinds(mode: str, engines: str, looking: bool, data: st.DataObject) -> None:
    modelled = msgspec.structs.replace(ENGINES[engines], schema=SCHEMAS[mode])
    limits, steps = data.draw(runs(modelled))
    Lockstep(limits, schema=SCHEMAS[mode], looking=looking).follow(steps)


@pytest.mark.parametrize("mode", SCHEMAS)
@pytest.mark.parametrize("hashing", ["orderly", "few"])
@settings(max_examples=25 * EXAMPLES_FACTOR, deadline=None)
@given(data=st.data())
def test_equal_where_events_are_longer_than_what_is_done_at_once(hashing: str, mode: str, data: st.DataObject) -> None:
    schema = SCHEMAS[mode]
    limits, steps = data.draw(runs(Engines((4, 4, 2, 8), hashing, prompt_tokens=240, schema=schema), steps_max=15))
    Lockstep(limits, schema=schema).follow(steps)


@settings(max_examples=30 * EXAMPLES_FACTOR, deadline=None)
@given(data=st.data(), bytes_max=st.sampled_from([20_000, 100_000]))
def test_bytes_are_bounded_and_nothing_breaks(data: st.DataObject, bytes_max: int) -> None:
    """What a record costs differs between the cores, so what goes first under a byte bound cannot be compared."""
    engines = Engines((4, 4, 8, 2), "by prefix", prompt_tokens=160)
    now_s = 0.0
    index = NativeIndex(SCHEMA, IndexLimits(ttl_s=20.0, bytes_max=bytes_max), lambda: now_s)
    keys = list({key: None for number in range(16) for key in keys_of(engines, number, 0, "m")})
    pick = data.draw(st.builds(lambda random: random.randrange, st.randoms(use_true_random=False)))
    for _ in range(40):
        name, *arguments = step(pick, engines)
        if name == "advance":
            now_s += arguments[0]
        elif name != "fill":
            getattr(index, name)(*arguments)
        if name == "apply":
            assert index.stats().bytes_estimated <= bytes_max
    lookup = index.lookup(keys)
    stats = index.stats()
    assert sum(map(bool, lookup.holders)) <= stats.blocks <= stats.entries
    for stream in index.streams():
        index.forget(stream)
    stats = index.stats()
    assert (stats.blocks, stats.entries, stats.orphans, stats.streams) == (0, 0, 0, 0)


# -- payloads ---------------------------------------------------------------------------------------------------------

CAPTURES = Path(__file__).parents[1] / "data" / "vllm-0.32"
DECODERS = {wire: load_decoder(wire) for wire in ("vllm", "sglang")}
KINDS = ["full_attention", "sliding_window", "mamba", "cross_attention"]


def apply_payloads(cores: Lockstep, stream: Stream, payloads: Sequence[bytes], wire: str, model: str | None) -> None:
    """Let the native index read payloads by itself, those with faults through Python; and the reference all through Python."""
    expected: dict[DpRank, ApplyReport] = {}
    reports: dict[DpRank, ApplyReport] = {}
    todo = list(payloads)
    while todo:
        applied = cores.native.apply_payloads(stream, todo, wire, model)
        for rank in applied.ranks:
            reports.setdefault(rank.dp_rank, ApplyReport()).add(rank.report)
        for payload in todo[: applied.taken]:
            decoded = DECODERS[wire].decode(payload)
            assert not decoded.faults
            apply_decoded(cores.reference, stream, decoded, model, expected)
        if applied.taken < len(todo):
            decoded = DECODERS[wire].decode(todo[applied.taken])
            assert decoded.faults
            apply_decoded(cores.reference, stream, decoded, model, expected)
            apply_decoded(cores.native, stream, decoded, model, reports)
        todo = todo[applied.taken + 1 :]
    assert reports == expected
    cores.compare()


def apply_decoded(
    index: Index, stream: Stream, decoded: DecodedPayload, model: str | None, reports: dict[DpRank, ApplyReport]
) -> None:
    (batch,) = decoded.batches
    rank = stream.dp_rank if batch.dp_rank is None else batch.dp_rank
    report = index.apply(Stream(stream.pod, rank), msgspec.structs.replace(batch, model=model))
    reports.setdefault(rank, ApplyReport()).add(report)


@pytest.mark.parametrize("block_size", [16, 24])
@pytest.mark.parametrize("name", sorted(path.name for path in CAPTURES.glob("*.bin")))
def test_recordings_of_real_engines_lead_to_equal_states(name: str, block_size: int) -> None:
    cores = Lockstep(MANY, schema=KeySchema(block_size))
    payloads = [frame.payload for frame in read_frames(CAPTURES / name)]
    for start in range(0, len(payloads), 50):
        apply_payloads(cores, A, payloads[start : start + 50], "vllm", "tiny")
    assert cores.keys
    cores.look_at_all()


def encoded(batch: EventBatch, rank: int | None, is_array: bool, random: random.Random) -> bytes:
    """A batch as vLLM sends it: events as maps, or as the arrays of older versions."""
    events: list[Any] = []
    for event in batch.events:
        fields: dict[str, Any] = {"type": type(event).__name__}
        if isinstance(event, BlockStored):
            salts = [[extra.value.decode() for extra in some if extra.kind == "salt"] or None for some in event.extras or ()]
            fields |= {
                "block_hashes": [hash_.to_bytes(32, "big") if random.random() < 0.2 else hash_ for hash_ in event.hashes],
                "parent_block_hash": event.parent,
                "token_ids": event.token_ids.tolist(),
                "block_size": event.block_size_tokens or 0,
                "lora_id": None,
                "medium": random.choice([None, "GPU", "CPU", str(event.tier)]),
                "lora_name": event.lora_name,
                "extra_keys": salts or None,
                "group_idx": event.group,
                "kv_cache_spec_kind": event.spec and random.choice(KINDS),
                "kv_cache_spec_sliding_window": event.spec and event.spec.window_tokens,
            }
        elif isinstance(event, BlockRemoved):
            fields |= {"block_hashes": list(event.hashes), "medium": str(event.tier).upper(), "group_idx": event.group}
        events.append(list(fields.values()) if is_array else fields)
    return msgspec.msgpack.encode([batch.timestamp_s or 0.0, events, rank])


@pytest.mark.parametrize("wire", ["vllm", "sglang"])
@pytest.mark.parametrize("is_array", [False, True], ids=["maps", "arrays"])
@settings(max_examples=40 * EXAMPLES_FACTOR, deadline=None)
@given(data=st.data(), random=st.randoms(use_true_random=False))
def test_payloads_lead_to_equal_states(data: st.DataObject, random: random.Random, is_array: bool, wire: str) -> None:
    limits, steps = data.draw(runs(Engines((4, 4, 8, 2), "by prefix")))
    cores = Lockstep(limits)
    for name, *arguments in steps:
        if name == "apply":
            stream, batch = arguments
            payloads = [encoded(batch, random.choice([None, 0, 1, 2]), is_array, random) for _ in range(random.randint(1, 2))]
            apply_payloads(cores, stream, payloads, wire, batch.model)
        else:
            cores.follow([(name, *arguments)])
    cores.look_at_all()


# -- what was found this way, made small ------------------------------------------------------------------------------

A = Stream(PodId("a"))
B = Stream(PodId("b"))
MANY = IndexLimits(bytes_max=1 << 40)


def stored(hashes: list[int], tokens: list[int], size: int = 4, parent: int | None = None) -> BlockStored:
    names = tuple(map(EngineHash, hashes))
    return BlockStored(names, None if parent is None else EngineHash(parent), array("I", tokens), size)


def check(*batches: tuple[Stream, list[Event]], limits: IndexLimits = MANY) -> Lockstep:
    cores = Lockstep(limits)
    cores.follow(("apply", stream, EventBatch(tuple(events), model="m")) for stream, events in batches)
    return cores


def test_blocks_of_two_kinds_in_one_event_count_as_used_in_their_order() -> None:
    either = stored([1], [0] * 4), stored([3], [1] * 8, size=8)
    named_again = BlockStored((EngineHash(1), EngineHash(3)))
    check((A, [*either, named_again]), (B, [stored([9], [5] * 4)]), limits=IndexLimits(blocks_max=3, bytes_max=1 << 40))


def test_evicting_a_key_gives_up_a_block_of_another_size_that_makes_it_up_and_is_held_nowhere() -> None:
    cores = check(
        (A, [stored([7], [0] * 8, size=8), AllBlocksCleared()]),
        (A, [stored([1], [0] * 4)]),
        limits=IndexLimits(ttl_s=7.0, bytes_max=1 << 40),
    )
    again = BlockStored((EngineHash(7),))
    cores.follow([("advance", 7.0), ("expire",), ("apply", A, EventBatch((again,), model="m"))])


def test_a_hash_that_comes_twice_in_an_event_counts_as_used_where_it_comes_first() -> None:
    limits = IndexLimits(blocks_max=3, bytes_max=1 << 40)
    check((A, [stored([7], [1] * 4)]), (A, [stored([7, 1, 2, 7], [0] * 16)]), (B, [stored([9], [5] * 4)]), limits=limits)


def test_a_hash_that_comes_twice_in_an_event_is_one_block_whatever_other_streams_call_so() -> None:
    check((A, [stored([1, 2, 3], [0] * 12)]), (B, [stored([1, 3, 3], [0] * 12)]), (B, [BlockRemoved((EngineHash(3),))]))


def test_an_orphan_that_was_named_by_an_event_waits_for_nothing() -> None:
    """It is named again, once, if it is an orphan again later."""
    orphan = stored([5], [0] * 4, parent=1)
    cores = check((A, [orphan, stored([5], [1] * 4)]), limits=IndexLimits(ttl_s=7.0, bytes_max=1 << 40))
    again = EventBatch((orphan, stored([1], [2] * 4)), model="m")
    cores.follow(
        [("advance", 7.0), ("expire",), ("apply", A, again), ("apply", A, EventBatch((BlockRemoved((EngineHash(5),)),)))]
    )
    assert cores.native.stats().entries == 1


def test_a_block_that_is_named_as_its_own_beginning_can_be_evicted() -> None:
    """An engine that names two blocks alike breaks no index."""
    cores = check(
        (A, [stored([1, 2], [0, 0], size=1)]),
        (A, [stored([3], [0], size=1, parent=2)]),
        limits=IndexLimits(ttl_s=7.0, retired_max=2, bytes_max=1 << 40),
    )
    gone = [BlockRemoved((EngineHash(1),)), stored([8], [9] * 4), BlockRemoved((EngineHash(8),))]
    cores.follow(
        [
            ("apply", A, EventBatch((*gone, *gone), model="m")),
            ("apply", A, EventBatch((stored([1], [4], size=1, parent=3),), model="m")),
            ("advance", 7.0),
            ("expire",),
        ]
    )
