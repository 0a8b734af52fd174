"""Hostile bytes: only DecodeError escapes a decoder, memory follows the payload's size, time is linear in it."""

from __future__ import annotations

import time
import tracemalloc
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvatlas.errors import DecodeError
from kvatlas.ingest.decode import DecodeLimits, Decoder, load_decoder, peek_header
from kvatlas.ingest.decode.generic import EventType, GenericEvent, encode_msgpack, encode_protobuf
from kvatlas.ingest.recording import read_frames
from kvatlas.types import AllBlocksCleared, BlockStored, DecodedPayload

DATA = Path(__file__).parents[1] / "data" / "vllm-0.32"
DECODERS = [load_decoder(name) for name in ("vllm", "sglang", "generic")]
HARMLESS = {"unknown_event", "bad_timestamp", "more_faults"}
U64_MAX = (1 << 64) - 1
I64_MIN = -(1 << 63)
MIB = 1 << 20

REAL = [
    frame.payload
    for name in ("base-sha256_cbor.bin", "hybrid-gemma3.bin", "base-sha256_cbor-raw-bytes-hashes.bin")
    for frame in read_frames(DATA / name)
]
PREFIX = array("I", range(64))
OURS = [
    encode([GenericEvent(type=kind, block_id="b", prefix=PREFIX, block_size_tokens=16, to_tier="cpu") for kind in EventType])
    for encode in (encode_msgpack, encode_protobuf)
]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(I64_MIN, U64_MAX)
    | st.integers(0, 40)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4),
    max_leaves=16,
)
tags = st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "BlockCreated", "PrefixCached"]) | values
keys = st.sampled_from(
    [
        *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys"),
        *("group_idx", "cache_salt", "metadata", "kv_cache_spec_kind", "kv_cache_spec_sliding_window"),
        *("block_id", "parent_block_id", "prefix", "tier", "dp_rank"),
    ]
)
events = (
    st.tuples(tags, st.lists(values, max_size=15)).map(lambda event: [event[0], *event[1]])
    | st.tuples(tags, st.dictionaries(keys, values)).map(lambda event: {"type": event[0], **event[1]})
    | values
)
batches = (
    st.tuples(values, st.lists(events, max_size=4), values)
    | st.fixed_dictionaries({"kvatlas": st.sampled_from([1, 1, 1, 2]), "events": st.lists(events, max_size=4)})
    | values
)


def decode(decoder: Decoder, payload: bytes) -> DecodedPayload | None:
    """Decode and check what a reader of the result relies on; None for a payload that is refused."""
    try:
        decoded = decoder.decode(payload)
    except DecodeError:
        return None
    for fault in decoded.faults:
        assert not fault.harmless or fault.reason in HARMLESS
    for batch in decoded.batches:
        assert batch.dp_rank is None or 0 <= batch.dp_rank < 1 << 16
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                continue
            assert all(0 <= block <= U64_MAX for block in event.hashes)
            assert event.tier == event.tier.lower() != ""
            if isinstance(event, BlockStored):
                assert event.token_ids.typecode == "I"
                assert event.extras is None or len(event.extras) == len(event.hashes)
                assert event.block_size_tokens is not None or not event.token_ids
    return decoded


def decode_all(payload: bytes) -> None:
    for decoder in DECODERS:
        decode(decoder, payload)
    rank = peek_header(payload).dp_rank
    assert rank is None or rank >= 0


@given(st.binary(max_size=200))
@example(b"\x92\xcb\x7f\xf8\0\0\0\0\0\0\x90")  # the time is NaN
@example(b"\x91" * 5000)
@example(b"\x81\xa1a" * 5000)
@example(b"\x92\x01\x91\x93\xabBlockStored\x91\x01\xc0" + b"\x91" * 5000)
@example(b"\x92\x01\x91\x92\xacBlockRemoved\x91\xa2\xff\xfe")  # a hash that is no UTF-8
@example(b"\x92\x01\x91\x92\xb0AllBlocksCleared\xd9\x01\xff")
@example(b"\x92\x01\x91\x92\xacBlockRemoved\x91\xc7\x0c\xff" + b"\xff" * 12)  # a timestamp out of range
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_decoded_or_refused(payload: bytes) -> None:
    decode_all(payload)


@given(batches)
@settings(max_examples=200, deadline=None)
def test_any_msgpack_is_decoded_or_refused(batch: Any) -> None:
    decode_all(msgspec.msgpack.encode(batch))


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_a_damaged_real_payload_is_decoded_or_refused(data: st.DataObject) -> None:
    payload = bytearray(data.draw(st.sampled_from([*REAL, *OURS])))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(payload) - 1))
        change = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if change == "set":
            payload[at] = data.draw(st.integers(0, 255))
        elif change == "cut" and len(payload) > 1:
            del payload[at : at + data.draw(st.integers(1, 9))]
            payload = payload or bytearray(b"\x90")
        elif change == "insert":
            payload[at:at] = data.draw(st.binary(max_size=9))
        else:
            payload[at:at] = payload[at : at + 40]
    decode_all(bytes(payload))


def stored_array(**changes: bytes) -> bytes:
    """One positional BlockStored in a batch, with fields replaced by raw msgpack."""
    fields = {
        "hashes": b"\x90",
        "parent": b"\xc0",
        "tokens": b"\x90",
        "size": b"\x00",
        "lora": b"\xc0\xc0\xc0",
        "extras": b"\xc0",
    }
    return b"\x92\x01\x91\x99\xabBlockStored" + b"".join((fields | changes).values())


def generic(*events: bytes) -> bytes:
    return b"\x82\xa7kvatlas\x01\xa6events\xdd" + len(events).to_bytes(4, "big") + b"".join(events)


HUGE = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x05",
]
BOMBS = [
    *HUGE,
    *(b"\x92\x01" + bomb for bomb in HUGE),
    *(b"\x92\x01\x91" + bomb for bomb in HUGE),
    *(stored_array(hashes=bomb) for bomb in HUGE),
    *(stored_array(tokens=bomb) for bomb in HUGE),
    *(stored_array(hashes=b"\x91\x01", extras=b"\x91" + bomb) for bomb in HUGE),
    *(b"\x82\xa7kvatlas\x01\xa6events" + bomb for bomb in HUGE),
    b"\x08\x01\x12\xff\xff\xff\xff\x0f",
]


def peak_bytes(payload: bytes) -> int:
    """The most memory that any decoder had at a time, beside the payload."""
    peak = 0
    for decoder in DECODERS:
        tracemalloc.start()
        try:
            decode(decoder, payload)
            peak = max(peak, tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return peak


@pytest.mark.parametrize("payload", BOMBS)
def test_a_declared_length_costs_no_memory(payload: bytes) -> None:
    assert peak_bytes(payload) < 100_000


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\x92\x01\xdd" + MIB.to_bytes(4, "big") + b"\xc0" * MIB, id="a million events of nothing"),
        pytest.param(b"\x92\x01\xdc\xff\xff" + b"\x90" * 0xFFFF, id="65535 events that are none"),
        pytest.param(stored_array(hashes=b"\xdd" + MIB.to_bytes(4, "big") + b"\xc0" * MIB), id="hashes of nothing"),
        pytest.param(stored_array(tokens=b"\xdd" + MIB.to_bytes(4, "big") + b"\x80" * MIB), id="tokens that are maps"),
        pytest.param(
            stored_array(hashes=b"\x91\x01", extras=b"\x91\xdd" + MIB.to_bytes(4, "big") + b"\x80" * MIB), id="a million extras"
        ),
        pytest.param(
            stored_array(hashes=b"\x91\x01", extras=b"\x91\x91\xdd" + MIB.to_bytes(4, "big") + b"\x80" * MIB),
            id="one huge extra",
        ),
        pytest.param(generic(*[b"\x80"] * 100_000), id="generic events of nothing"),
        pytest.param(
            generic(b"\x82\xa4type\xacBlockEvicted\xa8block_id\xdd" + MIB.to_bytes(4, "big") + b"\x80" * MIB), id="a huge id"
        ),
        pytest.param(
            generic(
                b"\x83\xa4type\xacPrefixCached\xaablock_size\x01\xa6prefix\xdd"
                + (MIB // 4).to_bytes(4, "big")
                + b"\x01" * (MIB // 4)
            ),
            id="a hash for every byte",
        ),
        pytest.param(b"\x08\x01" + b"\x12\x00" * (MIB // 2), id="empty protobuf events"),
    ],
)
def test_dense_payloads_cost_a_bounded_multiple_of_their_size(payload: bytes) -> None:
    assert peak_bytes(payload) < 50 * MIB


def test_the_default_limits_bound_extras_whatever_the_payload() -> None:
    one = stored_array(hashes=b"\x91\x01", extras=b"\x91\xdc\xff\xff" + b"\x01" * 0xFFFF)[3:]
    payload = b"\x92\x01\xdc\x00\x20" + one * 32  # two million extras
    decoded = decode(DECODERS[0], payload)
    assert decoded is not None
    assert [fault.reason for fault in decoded.faults] == ["oversize_event"] * 28
    assert len(decoded.batches[0].events) * 0xFFFF <= DecodeLimits().extras_per_payload_max


def many_events(count: int) -> bytes:
    removal = msgspec.msgpack.encode(["BlockRemoved", [1, 2, 3]])
    return b"\x92\x01\xdd" + count.to_bytes(4, "big") + removal * count


def many_tokens(count: int) -> bytes:
    return msgspec.msgpack.encode([1.0, [["BlockStored", list(range(count // 16)), None, list(range(count)), 16]]])


def many_extras(count: int) -> bytes:
    fields = [list(range(count)), None, list(range(count)), 1, None, None, None, [[["img", 0]]] * count]
    return msgspec.msgpack.encode([1.0, [["BlockStored", *fields]]])


def one_prefix(count: int) -> bytes:
    return encode_protobuf([GenericEvent(type=EventType.PREFIX_CACHED, prefix=array("I", range(count)), block_size_tokens=16)])


@pytest.mark.parametrize("make", [many_events, many_tokens, many_extras, one_prefix])
def test_time_is_linear_in_the_payload(make: Callable[[int], bytes]) -> None:
    """16 times the size takes 16 times the time; 256 times would be quadratic."""

    def seconds(count: int) -> float:
        payload = make(count)
        best = 1e9
        for _ in range(3):
            start = time.perf_counter()
            for decoder in DECODERS:
                decode(decoder, payload)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(16 * 2000) < 80 * max(seconds(2000), 1e-4)
