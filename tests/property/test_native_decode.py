"""The native decoder reads a payload as the Python decoders do where these find no fault, or leaves it to them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvatlas.errors import DecodeError
from kvatlas.ingest.decode import load_decoder
from kvatlas.ingest.recording import read_frames
from kvatlas.types import AllBlocksCleared, BlockRemoved, Event

native = pytest.importorskip("kvatlas._native")

DATA = Path(__file__).parents[1] / "data" / "vllm-0.32"
DECODERS = {wire: load_decoder(wire) for wire in ("vllm", "sglang")}
CAPTURES = sorted(path.name for path in DATA.glob("*.bin"))
REAL = sorted({frame.payload for name in CAPTURES for frame in read_frames(DATA / name) if len(frame.payload) < 2000})
U64_MAX = (1 << 64) - 1
I64_MIN = -(1 << 63)


def read_in_python(payload: bytes, wire: str) -> tuple[Any, ...] | None:
    """What the Python decoder reads, as the native one's tuples; None if there is any fault."""
    try:
        decoded = DECODERS[wire].decode(payload)
    except DecodeError:
        return None
    if decoded.faults:
        return None
    (batch,) = decoded.batches
    return (batch.timestamp_s, batch.dp_rank, [as_tuple(event) for event in batch.events])


def as_tuple(event: Event) -> tuple[Any, ...]:
    if isinstance(event, AllBlocksCleared):
        return (event.tier,)
    if isinstance(event, BlockRemoved):
        return (list(event.hashes), event.tier, event.group)
    spec = event.spec and (event.spec.kind.value, event.spec.window_tokens, event.spec.block_size_tokens)
    extras = event.extras
    return (
        list(event.hashes),
        event.parent,
        event.token_ids.tolist(),
        event.block_size_tokens,
        event.tier,
        event.group,
        spec,
        event.lora_name,
        None if extras is None else [[(extra.offset_tokens, extra.kind, extra.value) for extra in block] for block in extras],
    )


def agree(payload: bytes, wire: str) -> bool:
    """Check that a payload is read alike or left to Python; say whether it was read."""
    read = native.decode(payload, wire)
    assert read is None or read == read_in_python(payload, wire)
    return read is not None


@pytest.mark.parametrize("name", CAPTURES)
def test_all_that_a_real_vllm_sent_is_read(name: str) -> None:
    assert all(agree(frame.payload, wire) for frame in read_frames(DATA / name) for wire in DECODERS)


FIRST = ["BlockStored", [-5, 6], None, [1, 2, 3, 4], 2, None]
"""SGLang's oldest layout; each later one adds to it."""
SALT = {"cache_salt": "tenant"}


@pytest.mark.parametrize(
    "event",
    [
        FIRST,
        [*FIRST, "CPU_PINNED"],
        [*FIRST, "GPU", SALT],
        ["BlockStored", [7], 6, [1, 2], 2, None, "GPU", SALT],
        [*FIRST, "EXTERNAL", None, [["dynamo-cache-salt:tenant"], None], None, None, None, None, None, SALT],
        dict(zip(("block_hashes", "parent_block_hash", "token_ids", "block_size"), FIRST[1:5], strict=True))
        | {"type": "BlockStored", "medium": "HOST", "lora_name": "fr", "namespaced_block_hashes": [1, 2], **SALT},
        ["BlockRemoved", [-5]],
        ["BlockRemoved", [1], "GPU", 2, "sliding_window", 64, "LOCAL", "x"],
        ["AllBlocksCleared"],
        ["AllBlocksCleared", "mooncake"],
    ],
)
def test_all_layouts_of_sglang_are_read(event: Any) -> None:
    assert agree(msgspec.msgpack.encode([1.0, [event], 1]), "sglang")


@pytest.mark.parametrize(
    ("field", "last", "beyond"),
    [
        ("group_idx", 0xFFFF, 0x10000),
        ("block_size", 1 << 20, (1 << 20) + 1),
        ("lora_name", "é" * 4096, "é" * 4097),
        ("lora_id", "x" * 4096, "x" * 4097),
        ("session_id", "é" * 4096, "é" * 4097),
        ("medium", "M" * 4096, "M" * 4097),
        ("extra_keys", [["x" * 65_533]], [["x" * 65_534]]),
        ("extra_keys", [[["image", (1 << 31) - 1]]], [[["image", 1 << 31]]]),
        ("extra_keys", [["x"] * (1 << 18)], [["x"] * ((1 << 18) + 1)]),
        ("token_ids", [(1 << 32) - 1], [1 << 32]),
        ("token_ids", [1] * (1 << 23), [1] * ((1 << 23) + 1)),
    ],
)
def test_both_have_the_same_limits(field: str, last: Any, beyond: Any) -> None:
    event = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [1], "block_size": 1}
    assert agree(msgspec.msgpack.encode([1.0, [{**event, field: last}], 1]), "vllm")
    assert read_in_python(msgspec.msgpack.encode([1.0, [{**event, field: beyond}], 1]), "vllm") is None
    assert not agree(msgspec.msgpack.encode([1.0, [{**event, field: beyond}], 1]), "vllm")


ints = st.integers(0, 40) | st.integers(I64_MIN, U64_MAX) | st.sampled_from([-1, 0xFFFF, 0x10000, 1 << 31, 1 << 32, 1 << 63])
texts = st.sampled_from(["GPU", "Host", "fr", "lora:3", "", "é", "sliding_window", "mamba", "cache_salt"]) | st.text(max_size=8)
scraps = st.recursive(
    st.none() | st.booleans() | ints | st.floats() | texts | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | ints, inner, max_size=3),
    max_leaves=8,
)


def mostly(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Such a value, or now and then one of any type."""
    return st.integers(0, 99).flatmap(lambda at: scraps if at == 99 else values)


def optionally(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return mostly(st.none() | values)


hashes = st.integers(0, U64_MAX) | st.integers(I64_MIN, -1) | st.binary(min_size=1, max_size=32)
salts = st.dictionaries(st.just("cache_salt") | texts, st.none() | texts, max_size=2)
keys = texts | st.tuples(texts, st.integers(-99, 99)) | st.binary(max_size=40)
optional = {
    "lora_id": optionally(st.integers(-1, 3) | texts),
    "medium": optionally(texts),
    "lora_name": optionally(texts | salts),
    "extra_keys": optionally(st.lists(st.none() | st.lists(mostly(keys), max_size=3), min_size=2, max_size=2)),
    "group_idx": optionally(st.integers(0, 9)),
    "kv_cache_spec_kind": optionally(texts),
    "kv_cache_spec_sliding_window": optionally(ints),
    "locality": optionally(texts),
    "ownership": optionally(texts),
}
required = {
    "block_hashes": mostly(st.lists(hashes, min_size=2, max_size=2)),
    "parent_block_hash": optionally(hashes),
    "token_ids": mostly(st.lists(st.integers(0, 0xFFFF_FFFF) | st.integers(0, 300), max_size=8)),
    "block_size": mostly(st.sampled_from([2, 4, 16])),
}
stored = st.fixed_dictionaries({"type": st.just("BlockStored"), **required, **optional, "last": st.none() | texts | salts})
stored_map = st.fixed_dictionaries(
    {"type": st.just("BlockStored"), **required},
    optional=optional
    | {"session_id": optionally(texts), "cache_salt": optionally(texts), "metadata": optionally(salts), "x": scraps},
)
removed = st.fixed_dictionaries(
    {"type": st.sampled_from(["BlockRemoved", "AllBlocksCleared"]), "block_hashes": mostly(st.lists(hashes, max_size=3))},
    optional={name: optional[name] for name in ("medium", "group_idx", "locality", "ownership")},
)
cut = st.tuples(stored | removed, st.integers(5, 20)).map(lambda event: list(event[0].values())[: event[1]])
shuffled = (stored_map | removed).flatmap(lambda event: st.permutations(list(event.items())).map(dict))
times = mostly(st.none() | st.floats(allow_nan=False, allow_infinity=False) | ints)
batches = st.tuples(times, st.lists(mostly(shuffled | stored_map | cut), max_size=3), optionally(st.integers(0, 0xFFFF)))
wires = st.sampled_from(sorted(DECODERS))


@given(batches, wires)
@example((1.0, [["AllBlocksCleared", "é"]], None), "vllm")
@settings(max_examples=1000, deadline=None)
def test_what_is_read_of_any_events_is_what_python_reads(batch: Any, wire: str) -> None:
    agree(msgspec.msgpack.encode(batch), wire)


@given(batches, wires, st.data())
@settings(max_examples=1000, deadline=None)
def test_what_is_read_of_a_damaged_payload_is_what_python_reads(batch: Any, wire: str, data: st.DataObject) -> None:
    payload = bytearray(data.draw(st.just(msgspec.msgpack.encode(batch)) | st.sampled_from(REAL)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)))
        new = data.draw(st.binary(min_size=1, max_size=3) | st.just(b"") | st.just(bytes(payload[:20])))
        payload[at : at + data.draw(st.integers(0, 9))] = new
    agree(bytes(payload), wire)


@pytest.mark.parametrize("wire", sorted(DECODERS))
def test_a_payload_that_is_cut_short_is_left_to_python(wire: str) -> None:
    for payload in REAL[:: len(REAL) // 20]:
        assert not any(agree(payload[:end], wire) for end in range(len(payload)))


def test_nothing_but_a_batch_or_none_comes_of_deep_nesting() -> None:
    deep = b"\x91" * (4 * sys.getrecursionlimit()) + b"\xc0"
    event = b"\x82\xa4type\xb0AllBlocksCleared\xa1x"
    assert native.decode(deep, "vllm") is None
    assert native.decode(b"\x92\xc0\x91" + event + deep, "vllm") is None
