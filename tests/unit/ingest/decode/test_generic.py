"""The generic format: both forms say the same, and each event does to an index what the package's table says."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import xxhash

from kvatlas.errors import DecodeError
from kvatlas.index import ReferenceIndex
from kvatlas.ingest.decode import DecodeLimits, load_decoder
from kvatlas.ingest.decode.generic import (
    EventType,
    GenericDecoder,
    GenericEvent,
    encode_msgpack,
    encode_protobuf,
    prefix_hashes,
)
from kvatlas.keys import KeySchema
from kvatlas.proto.kvatlas.v1 import events_pb2
from kvatlas.types import BlockRemoved, BlockStored, DecodedPayload, EventBatch, GroupSpec, PodId, Stream

Encode = Callable[[Sequence[GenericEvent]], bytes]
CREATED, EVICTED, MIGRATED, CACHED = EventType
EVICTED_3 = events_pb2.Event(type=events_pb2.EVENT_TYPE_BLOCK_EVICTED, block_id=events_pb2.BlockId(number=3))
TOKENS = array("I", range(100, 108))
both_forms = pytest.mark.parametrize("encode", [encode_msgpack, encode_protobuf])


def created(block_id: Any = 1, **fields: Any) -> GenericEvent:
    return GenericEvent(type=CREATED, block_id=block_id, **fields)


def decode(*events: GenericEvent, encode: Encode = encode_msgpack, limits: DecodeLimits | None = None) -> DecodedPayload:
    return GenericDecoder(limits).decode(encode(events))


def batches(*events: GenericEvent, encode: Encode = encode_msgpack) -> tuple[EventBatch, ...]:
    decoded = decode(*events, encode=encode)
    assert decoded.faults == ()
    return decoded.batches


def stored(*hashes: int, **fields: Any) -> BlockStored:
    size = fields.get("block_size_tokens")
    return BlockStored(hashes=hashes, spec=GroupSpec(block_size_tokens=size) if size else None, **fields)  # type: ignore[arg-type]


def removed(*hashes: int, **fields: Any) -> BlockRemoved:
    return BlockRemoved(hashes=hashes, **fields)  # type: ignore[arg-type]


class Pod:
    """An index with blocks of 2 tokens, fed by generic events."""

    def __init__(self) -> None:
        self.index = ReferenceIndex(KeySchema(block_size_tokens=2))

    def tell(self, *events: GenericEvent) -> None:
        for batch in batches(*events):
            self.index.apply(Stream(batch.pod or PodId("here")), batch)

    def copies(self, pod: str = "here", tokens: Sequence[int] = TOKENS) -> list[int]:
        """Copies of each block of a prompt that a pod holds, in any tier."""
        keys = self.index.schema.keys(array("I", tokens), "m")
        return [sum(slots.values()) for slots in self.index.lookup(keys, [PodId(pod)]).holders]


# -- forms ---------------------------------------------------------------------------------------------------------------


@both_forms
def test_every_field_survives(encode: Encode) -> None:
    events = [
        created(
            5,
            pod_id="a",
            parent_block_id=b"\x01" * 32,
            prefix=TOKENS[:2],
            timestamp_s=12.5,
            block_size_tokens=2,
            tier="CPU",
            model="m",
            lora_name="fr",
            dp_rank=0,
            group=3,
        ),
        GenericEvent(
            type=MIGRATED,
            block_id="name",
            pod_id="a",
            dp_rank=1,
            model="m",
            from_tier="gpu",
            to_tier="disk",
            to_pod_id="b",
            to_dp_rank=2,
        ),
    ]
    name = xxhash.xxh3_64_intdigest(b"name")
    assert batches(*events, encode=encode) == (
        EventBatch(
            (
                stored(
                    5,
                    parent=int.from_bytes(b"\x01" * 8, "big"),
                    token_ids=TOKENS[:2],
                    block_size_tokens=2,
                    tier="cpu",
                    group=3,
                    lora_name="fr",
                ),
            ),
            timestamp_s=12.5,
            dp_rank=0,  # type: ignore[arg-type]
            pod=PodId("a"),
            model="m",
        ),
        EventBatch((stored(name, tier="disk"),), dp_rank=2, pod=PodId("b"), model="m"),  # type: ignore[arg-type]
        EventBatch((removed(name),), dp_rank=1, pod=PodId("a"), model="m"),  # type: ignore[arg-type]
    )


@both_forms
def test_a_negative_block_id_is_its_bits(encode: Encode) -> None:
    assert batches(created(-1), encode=encode)[0].events == (stored((1 << 64) - 1),)


@both_forms
def test_a_payload_without_events_is_read(encode: Encode) -> None:
    assert decode(encode=encode) == DecodedPayload(())


def test_protobuf_fields_may_come_in_any_order() -> None:
    event = events_pb2.Event(type=events_pb2.EVENT_TYPE_BLOCK_EVICTED, block_id=events_pb2.BlockId(number=4))
    events, version = events_pb2.EventBatch(events=[event]), events_pb2.EventBatch(version=1)
    payload = events.SerializeToString() + version.SerializeToString()
    assert GenericDecoder().decode(payload).batches[0].events == (removed(4),)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "not_a_batch"),
        (b"\x81", "not_msgpack"),
        (b"\xc1", "not_msgpack"),
        (b"\x81\xa7kvatlas" * 50_000, "not_msgpack"),
        (msgspec.msgpack.encode([1.0, []]), "not_a_batch"),
        (msgspec.msgpack.encode({"events": []}), "not_a_batch"),
        (msgspec.msgpack.encode({"kvatlas": "1"}), "not_a_batch"),
        (msgspec.msgpack.encode({"kvatlas": 1, "events": 7}), "not_a_batch"),
        (msgspec.msgpack.encode({"kvatlas": 2, "events": [{"x": 1}]}), "unsupported_version"),
        (events_pb2.EventBatch(version=2).SerializeToString(), "unsupported_version"),
        (
            events_pb2.EventBatch(events=[EVICTED_3]).SerializeToString(),
            "unsupported_version",
        ),
        (b"\x08", "not_protobuf"),
        (b"\x12\xff\xff\xff\xff\x0f", "not_protobuf"),
        (b"\x08" + b"\xff" * 11, "not_protobuf"),
        (b"\x0b", "not_protobuf"),
    ],
)
def test_what_is_no_payload_as_a_whole_is_a_decode_error(payload: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        GenericDecoder().decode(payload)
    assert caught.value.reason == reason


@both_forms
@pytest.mark.parametrize("limits", [DecodeLimits(payload_bytes_max=3), DecodeLimits(events_max=1)])
def test_a_payload_over_its_limits_is_refused_as_a_whole(encode: Encode, limits: DecodeLimits) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(created(1), created(2), encode=encode, limits=limits)
    assert caught.value.reason == "oversize"


def test_one_bad_event_in_msgpack_costs_itself_only() -> None:
    good = {"type": "BlockEvicted", "block_id": 3, "of tomorrow": 1}
    bad = [7, {}, {"type": 7}, {"type": "BlockEvicted", "tier": 1.5}]
    decoded = GenericDecoder().decode(msgspec.msgpack.encode({"kvatlas": 1, "events": [*bad, good], "more": 1}))
    assert decoded.batches == (EventBatch((removed(3),)),)
    assert [fault.reason for fault in decoded.faults] == ["bad_field"] * 4


@pytest.mark.parametrize("block_id", [1.5, [1], {"a": 1}, True, "x" * 5000])
def test_a_block_id_of_another_type_is_a_fault(block_id: Any) -> None:
    payload = msgspec.msgpack.encode({"kvatlas": 1, "events": [{"type": "BlockEvicted", "block_id": block_id}]})
    assert [fault.reason for fault in GenericDecoder().decode(payload).faults] == ["bad_hash"]


def test_one_bad_event_in_protobuf_costs_itself_only() -> None:
    good = EVICTED_3.SerializeToString()
    bad = b"\x12\x02\xff\xfe"  # a pod_id that is no UTF-8
    payload = b"\x08\x01" + b"".join(b"\x12" + bytes([len(raw)]) + raw for raw in (bad, good))
    decoded = GenericDecoder().decode(payload)
    assert decoded.batches == (EventBatch((removed(3),)),)
    assert [fault.reason for fault in decoded.faults] == ["bad_field"]


def test_an_unknown_type_is_a_harmless_fault() -> None:
    for payload in (
        msgspec.msgpack.encode({"kvatlas": 1, "events": [{"type": "BlockPinned"}]}),
        events_pb2.EventBatch(version=1, events=[events_pb2.Event(type=99)]).SerializeToString(),  # type: ignore[arg-type]
    ):
        (fault,) = GenericDecoder().decode(payload).faults
        assert (fault.reason, fault.harmless) == ("unknown_event", True)


@both_forms
@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (GenericEvent(type=CREATED), "missing_field"),
        (GenericEvent(type=EVICTED), "missing_field"),
        (GenericEvent(type=MIGRATED, to_tier="cpu"), "missing_field"),
        (GenericEvent(type=MIGRATED, block_id=1), "missing_field"),
        (GenericEvent(type=MIGRATED, block_id=1, to_tier="GPU"), "bad_field"),
        (GenericEvent(type=MIGRATED, block_id=1, pod_id="a", to_pod_id="a"), "bad_field"),
        (created(prefix=TOKENS, block_size_tokens=3), "bad_prefix"),
        (GenericEvent(type=EVICTED, prefix=TOKENS[:3], block_size_tokens=2), "bad_prefix"),
        (created(prefix=TOKENS, block_size_tokens=0), "bad_block_size"),
        (created(prefix=TOKENS, block_size_tokens=1 << 21), "bad_block_size"),
        (created(timestamp_s=float("nan")), "bad_field"),
        (created(dp_rank=1 << 20), "bad_field"),
        (created(group=1 << 20), "bad_field"),
        (created(tier="x" * 5000), "bad_field"),
        (created(pod_id="x" * 5000), "bad_field"),
        (created(b""), "bad_hash"),
    ],
)
def test_an_event_that_cannot_be_meant_is_a_fault(encode: Encode, event: GenericEvent, reason: str) -> None:
    decoded = decode(created(8), event, created(9), encode=encode)
    assert [(fault.reason, fault.harmless) for fault in decoded.faults] == [(reason, False)]
    assert decoded.batches == (EventBatch((stored(8), stored(9))),)


def test_derived_hashes_are_bounded_over_the_payload() -> None:
    cached = GenericEvent(type=CACHED, prefix=TOKENS, block_size_tokens=1)
    decoded = decode(cached, cached, limits=DecodeLimits(hashes_per_event_max=12))
    assert [fault.reason for fault in decoded.faults] == ["oversize_event"]
    assert len(decoded.batches[0].events) == 2


# -- batches -------------------------------------------------------------------------------------------------------------


def test_neighbours_of_one_origin_share_a_batch_and_the_order_is_kept() -> None:
    read = batches(
        created(1, pod_id="a", timestamp_s=1.0),
        created(2, pod_id="a", timestamp_s=2.0),
        created(3, pod_id="a"),
        created(4, pod_id="b"),
        created(5, pod_id="a"),
        created(6, pod_id="a", dp_rank=1),
        created(7, pod_id="a", dp_rank=1, model="m"),
    )
    assert [(batch.pod, batch.dp_rank, batch.model, batch.timestamp_s) for batch in read] == [
        ("a", None, None, 2.0),
        ("b", None, None, None),
        ("a", None, None, None),
        ("a", 1, None, None),
        ("a", 1, "m", None),
    ]
    assert [len(batch.events) for batch in read] == [3, 1, 1, 1, 1]


# -- what the events do --------------------------------------------------------------------------------------------------


def test_a_created_block_is_found_after_its_parent() -> None:
    pod = Pod()
    pod.tell(
        created(1, model="m", prefix=TOKENS[:2]),
        created("two", model="m", parent_block_id=1, prefix=TOKENS[2:4]),
        created(3, model="m", parent_block_id="two", prefix=TOKENS[:6], block_size_tokens=2),  # whole prefix: its end counts
    )
    assert pod.copies() == [1, 1, 1, 0]
    pod.tell(GenericEvent(type=EVICTED, block_id="two", model="m"))
    assert pod.copies() == [1, 0, 1, 0]


def test_a_block_told_with_its_whole_prefix_is_found_and_counts_alone() -> None:
    pod = Pod()
    pod.tell(created(4, model="m", prefix=TOKENS, block_size_tokens=2))
    assert pod.copies() == [0, 0, 0, 1]
    pod.tell(created(2, model="m", prefix=TOKENS[:4], block_size_tokens=2))
    assert pod.copies() == [0, 1, 0, 1]
    pod.tell(GenericEvent(type=EVICTED, block_id=4, model="m"))
    assert pod.copies() == [0, 1, 0, 0]


def test_a_block_without_tokens_waits_for_them() -> None:
    pod = Pod()
    pod.tell(created(1, model="m"))
    assert pod.copies() == [0, 0, 0, 0]
    pod.tell(created(1, model="m", prefix=TOKENS[:2]))
    assert pod.copies() == [2, 0, 0, 0]


def test_a_cached_prefix_is_held_once_however_often_it_is_told() -> None:
    pod = Pod()
    for length in (4, 5, 8, 8):  # 5: a partial block is left out
        pod.tell(GenericEvent(type=CACHED, model="m", prefix=TOKENS[:length], block_size_tokens=2))
    assert pod.copies() == [1, 1, 1, 1]


def test_a_cached_prefix_shorter_than_a_block_says_nothing() -> None:
    assert batches(GenericEvent(type=CACHED, prefix=TOKENS)) == ()  # the decoder's blocks have 16 tokens


def test_a_block_of_a_cached_prefix_is_evicted_by_the_prefix_that_ends_with_it() -> None:
    pod = Pod()
    pod.tell(
        GenericEvent(type=CACHED, model="m", prefix=TOKENS, block_size_tokens=2),
        GenericEvent(type=EVICTED, model="m", prefix=TOKENS[:6], block_size_tokens=2),
    )
    assert pod.copies() == [1, 1, 0, 1]


def test_derived_hashes_tell_models_and_adapters_apart() -> None:
    hashes = {
        prefix_hashes(TOKENS, 2, model=model, lora_name=lora)[0]
        for model, lora in [(None, None), ("a", None), (None, "a"), ("a", "a")]
    }
    assert len(hashes) == 4
    assert prefix_hashes(TOKENS, 2)[:2] == prefix_hashes(TOKENS[:5], 2)
    assert prefix_hashes([1, 2, 3], 2) == prefix_hashes(array("I", [1, 2]), 2) == [7138624374926967003]


def test_a_block_that_changes_its_tier_is_held_all_the_time() -> None:
    (batch,) = batches(GenericEvent(type=MIGRATED, block_id=1, to_tier="cpu"))
    assert batch.events == (stored(1, tier="cpu"), removed(1))
    pod = Pod()
    pod.tell(created(1, model="m", prefix=TOKENS[:2]), GenericEvent(type=MIGRATED, model="m", block_id=1, to_tier="cpu"))
    keys = pod.index.schema.keys(TOKENS[:2], "m")
    assert [(slot.tier, copies) for slot, copies in pod.index.lookup(keys).holders[0].items()] == [("cpu", 1)]


def test_a_block_that_changes_its_pod_makes_two_batches() -> None:
    pod = Pod()
    pod.tell(created(1, pod_id="a", model="m", prefix=TOKENS[:2]))
    pod.tell(GenericEvent(type=MIGRATED, block_id=1, pod_id="a", to_pod_id="b", model="m", prefix=TOKENS[:2]))
    assert pod.copies("a") == [0, 0, 0, 0]
    assert pod.copies("b") == [1, 0, 0, 0]


def test_a_block_without_id_moves_by_its_prefix() -> None:
    pod = Pod()
    pod.tell(
        GenericEvent(type=CACHED, model="m", prefix=TOKENS, block_size_tokens=2, pod_id="a"),
        GenericEvent(type=MIGRATED, model="m", prefix=TOKENS, block_size_tokens=2, pod_id="a", to_pod_id="b"),
    )
    assert (pod.copies("a"), pod.copies("b")) == ([1, 1, 1, 0], [0, 0, 0, 1])


def test_the_decoder_is_found_by_name() -> None:
    assert load_decoder("generic").name == "generic"
