"""vLLM's payloads, both forms of event, and what each odd field becomes."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import pytest

from kvatlas.errors import ConfigError, DecodeError
from kvatlas.ingest.decode import DecodeLimits, load_decoder, peek_header
from kvatlas.ingest.decode.vllm import VllmDecoder
from kvatlas.types import (
    CPU,
    GPU,
    STORAGE,
    AllBlocksCleared,
    AttentionKind,
    BlockRemoved,
    BlockStored,
    DecodedPayload,
    Event,
    Extra,
    GroupSpec,
)

STORED: dict[str, Any] = {
    "type": "BlockStored",
    "block_hashes": [1, 2],
    "parent_block_hash": None,
    "token_ids": [5, 6, 7, 8],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
}


def decode(*events: Any, ts: Any = 1.5, rank: Any = 0, limits: DecodeLimits | None = None) -> DecodedPayload:
    return VllmDecoder(limits).decode(msgspec.msgpack.encode([ts, list(events), rank]))


def only(*events: Any) -> Event:
    """The one event of a payload without faults."""
    decoded = decode(*events)
    assert decoded.faults == ()
    (event,) = decoded.batches[0].events
    return event


def stored(**changes: Any) -> BlockStored:
    event = only(STORED | changes)
    assert isinstance(event, BlockStored)
    return event


def fault_of(event: Any, limits: DecodeLimits | None = None) -> str:
    """The reason of the one fault; a sound event beside it must survive."""
    decoded = decode({"type": "AllBlocksCleared"}, event, {"type": "AllBlocksCleared"}, limits=limits)
    assert decoded.batches[0].events == (AllBlocksCleared(), AllBlocksCleared())
    (fault,) = decoded.faults
    return fault.reason


# -- the batch -----------------------------------------------------------------------------------------------------------


def test_a_batch_carries_the_engines_time_and_rank() -> None:
    batch = decode(ts=12.25, rank=3).batches[0]
    assert (batch.timestamp_s, batch.dp_rank, batch.pod, batch.events) == (12.25, 3, None, ())


def test_a_batch_without_rank_is_that_of_an_older_engine() -> None:
    batch = VllmDecoder().decode(msgspec.msgpack.encode([1, [["AllBlocksCleared"]]])).batches[0]
    assert (batch.timestamp_s, batch.dp_rank, batch.events) == (1.0, None, (AllBlocksCleared(),))


def test_elements_after_the_rank_are_ignored() -> None:
    payload = msgspec.msgpack.encode([1.0, [], 2, {"new": [1]}, "x"])
    assert VllmDecoder().decode(payload).batches[0].dp_rank == 2


@pytest.mark.parametrize(("ts", "reason"), [(float("nan"), "bad_timestamp"), (float("inf"), "bad_timestamp")])
def test_a_time_that_is_no_number_is_a_harmless_fault(ts: float, reason: str) -> None:
    decoded = decode({"type": "AllBlocksCleared"}, ts=ts)
    assert [(fault.reason, fault.harmless) for fault in decoded.faults] == [(reason, True)]
    assert decoded.batches[0].timestamp_s is None
    assert decoded.batches[0].events == (AllBlocksCleared(),)


@pytest.mark.parametrize("rank", [-1, 1 << 40, "0", 1.5, [0]])
def test_an_odd_rank_is_a_fault_that_is_not_harmless(rank: Any) -> None:
    decoded = decode(rank=rank)
    assert [(fault.reason, fault.harmless) for fault in decoded.faults] == [("bad_dp_rank", False)]
    assert decoded.batches[0].dp_rank is None


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "not_msgpack"),
        (b"\xc1", "not_msgpack"),
        (b"\x92\x01", "not_msgpack"),
        (b"\x92\x01\x90\x00", "not_msgpack"),  # bytes behind the value
        (b"\x91" * 100_000, "not_msgpack"),
        (b"\x01", "not_a_batch"),
        (b"\x80", "not_a_batch"),
        (b"\x91\x01", "not_a_batch"),
        (b"\x92\x01\x02", "not_a_batch"),
        (b"\x92\xa1x\x90", "not_a_batch"),
        (b"\x92\xc3\x90", "not_a_batch"),
    ],
)
def test_what_is_no_batch_as_a_whole_is_a_decode_error(payload: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        VllmDecoder().decode(payload)
    assert caught.value.reason == reason


def test_a_payload_over_its_limits_is_refused_as_a_whole() -> None:
    for limits in (DecodeLimits(payload_bytes_max=10), DecodeLimits(events_max=1)):
        with pytest.raises(DecodeError) as caught:
            decode({"type": "AllBlocksCleared"}, {"type": "AllBlocksCleared"}, limits=limits)
        assert caught.value.reason == "oversize"


def test_a_flood_of_faults_is_summed_up() -> None:
    decoded = decode(*[["Nonsense"]] * 5, ["BlockRemoved"], limits=DecodeLimits(faults_max=2))
    assert [fault.reason for fault in decoded.faults] == ["unknown_event", "unknown_event", "more_faults"]
    assert not decoded.faults[-1].harmless  # a removal is among them


# -- events --------------------------------------------------------------------------------------------------------------


def test_map_and_array_say_the_same() -> None:
    full = STORED | {
        "lora_name": "fr",
        "extra_keys": [["fr"], None],
        "group_idx": 2,
        "kv_cache_spec_kind": "sliding_window",
        "kv_cache_spec_sliding_window": 64,
        "locality": "LOCAL",
        "ownership": "fs",
        "session_id": "s1",
    }
    event = only(full)
    assert event == only(list(full.values()))
    assert event == BlockStored(
        hashes=(1, 2),  # type: ignore[arg-type]
        token_ids=array("I", [5, 6, 7, 8]),
        block_size_tokens=2,
        group=2,  # type: ignore[arg-type]
        spec=GroupSpec(AttentionKind.SLIDING_WINDOW, 64, 2),
        lora_name="fr",
        extras=((), ()),
        session_id="s1",
        locality="LOCAL",
        ownership="fs",
    )


@pytest.mark.parametrize("length", range(5, 9))
def test_an_older_engines_array_may_end_early(length: int) -> None:
    assert only(list(STORED.values())[:length]) == only(STORED)


def test_unknown_keys_and_trailing_fields_are_ignored() -> None:
    assert only(STORED | {"future": {"a": [1]}}) == only(STORED)
    trailing = [*STORED.values(), None, None, None, None, None, None, None, "future", 7]
    assert only(trailing) == only(STORED)


def test_removals_in_both_forms() -> None:
    assert only({"type": "BlockRemoved", "block_hashes": [9], "medium": "CPU", "group_idx": 1}) == BlockRemoved(
        hashes=(9,),  # type: ignore[arg-type]
        tier=CPU,
        group=1,  # type: ignore[arg-type]
    )
    assert only(["BlockRemoved", [9]]) == BlockRemoved(hashes=(9,), tier=GPU, group=None)  # type: ignore[arg-type]
    assert only(["BlockRemoved", [9], "STORAGE", None, "REMOTE", "nixl"]) == BlockRemoved(
        hashes=(9,),  # type: ignore[arg-type]
        tier=STORAGE,
        locality="REMOTE",
        ownership="nixl",
    )


def test_a_clear_may_name_its_tier() -> None:
    assert only({"type": "AllBlocksCleared"}) == AllBlocksCleared(None)
    assert only(["AllBlocksCleared"]) == AllBlocksCleared(None)
    assert only({"type": "AllBlocksCleared", "medium": "CPU"}) == AllBlocksCleared(CPU)
    assert only(["AllBlocksCleared", "STORAGE"]) == AllBlocksCleared(STORAGE)


def test_an_unknown_event_type_is_a_harmless_fault() -> None:
    decoded = decode(["BlockMoved", 1], {"type": "BlockMoved"})
    assert [(fault.reason, fault.harmless) for fault in decoded.faults] == [("unknown_event", True)] * 2


@pytest.mark.parametrize("event", [1, None, "BlockStored", [], {}, [7, []], {"type": 7}, {"kind": "BlockStored"}])
def test_what_names_no_event_type_is_a_fault(event: Any) -> None:
    assert fault_of(event) == "not_an_event"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_hashes": 1}, "bad_hash"),
        ({"block_hashes": ["a"]}, "bad_hash"),
        ({"block_hashes": [b""]}, "bad_hash"),
        ({"block_hashes": [1.5]}, "bad_hash"),
        ({"parent_block_hash": "a"}, "bad_hash"),
        ({"parent_block_hash": b""}, "bad_hash"),
        ({"token_ids": None}, "bad_tokens"),
        ({"token_ids": [1, -1]}, "bad_tokens"),
        ({"token_ids": [1 << 32]}, "bad_tokens"),
        ({"token_ids": [1.5]}, "bad_tokens"),
        ({"token_ids": [True]}, "bad_tokens"),
        ({"token_ids": [[1, 2], [2, 3]]}, "bad_tokens"),
        ({"block_size": -1}, "bad_block_size"),
        ({"block_size": (1 << 20) + 1}, "bad_block_size"),
        ({"block_size": 0}, "bad_block_size"),  # there are tokens, so this is no placeholder
        ({"block_size": "2"}, "bad_field"),
        ({"medium": 1}, "bad_field"),
        ({"medium": "x" * 5000}, "bad_field"),
        ({"group_idx": -1}, "bad_field"),
        ({"group_idx": 1 << 20}, "bad_field"),
        ({"extra_keys": [None]}, "extra_keys_length"),
        ({"extra_keys": []}, "extra_keys_length"),
        ({"extra_keys": 7}, "bad_extra_keys"),
        ({"extra_keys": ["salt", None]}, "bad_extra_keys"),
        ({"extra_keys": [[["img", 1 << 31]], None]}, "bad_extra_keys"),
    ],
)
def test_a_damaged_field_costs_its_event_only(changes: dict[str, Any], reason: str) -> None:
    assert fault_of(STORED | changes) == reason


def test_a_missing_required_field_is_a_fault() -> None:
    assert fault_of({"type": "BlockStored", "block_hashes": [1]}) == "bad_field"
    assert fault_of(["BlockStored", [1], None, [1]]) == "bad_field"


def test_invalid_utf8_costs_its_event_only() -> None:
    good = msgspec.msgpack.encode(["BlockRemoved", [1], "QQ"])
    payload = b"\x92\x01\x92" + good.replace(b"QQ", b"\xff\xfe") + b"\x91\xb0AllBlocksCleared"
    decoded = VllmDecoder().decode(payload)
    assert decoded.batches[0].events == (AllBlocksCleared(),)
    assert [fault.reason for fault in decoded.faults] == ["bad_field"]


@pytest.mark.parametrize(
    "limits",
    [
        DecodeLimits(hashes_per_event_max=1),
        DecodeLimits(tokens_per_event_max=3),
        DecodeLimits(extras_per_payload_max=1),
        DecodeLimits(extra_bytes_max=3),
    ],
)
def test_an_event_over_a_limit_is_a_fault(limits: DecodeLimits) -> None:
    event = STORED | {"extra_keys": [["salt"], [b"1234"]]}
    assert only(event)
    assert fault_of(event, limits) == "oversize_event"


# -- fields --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (0, 0),
        ((1 << 64) - 1, (1 << 64) - 1),
        (-1, (1 << 64) - 1),
        (-(1 << 63), 1 << 63),
        (bytes(range(32)), int.from_bytes(bytes(range(24, 32)), "big")),
        (b"\xff" * 8, (1 << 64) - 1),
        (b"\x01\x02", 0x0102),
    ],
)
def test_hashes_of_any_form_are_64_bits(wire: int | bytes, expected: int) -> None:
    event = stored(block_hashes=[wire, 7], parent_block_hash=wire)
    assert (event.hashes, event.parent) == ((expected, 7), expected)


@pytest.mark.parametrize(
    ("medium", "tier"),
    [(None, "gpu"), ("", "gpu"), ("GPU", "gpu"), ("CPU", "cpu"), ("STORAGE", "storage"), ("Disk", "disk"), ("CXL", "cxl")],
)
def test_a_medium_is_a_tier_in_lower_case_and_an_unknown_one_is_not_the_gpu(medium: str | None, tier: str) -> None:
    assert stored(medium=medium).tier == tier


@pytest.mark.parametrize(
    ("lora_id", "lora_name", "expected"),
    [
        (None, None, None),
        (0, None, None),
        (0, "", None),
        (3, None, "lora:3"),
        (3, "fr", "fr"),
        (None, "fr", "fr"),
        ("uuid", None, "lora:uuid"),
    ],
)
def test_an_adapter_known_by_number_only_is_not_the_base_model(
    lora_id: int | str | None, lora_name: str | None, expected: str | None
) -> None:
    assert stored(lora_id=lora_id, lora_name=lora_name).lora_name == expected


@pytest.mark.parametrize(
    ("kind", "window", "attention", "window_tokens"),
    [
        (None, None, AttentionKind.FULL, None),
        ("full_attention", None, AttentionKind.FULL, None),
        ("mla_attention", None, AttentionKind.FULL, None),
        ("sink_full_attention", None, AttentionKind.FULL, None),
        ("unknown", None, AttentionKind.FULL, None),
        ("of_tomorrow", 9, AttentionKind.FULL, None),
        ("chunked_local_attention", 64, AttentionKind.FULL, None),
        ("sliding_window", 64, AttentionKind.SLIDING_WINDOW, 64),
        ("sliding_window_mla", 64, AttentionKind.SLIDING_WINDOW, 64),
        ("sliding_window", None, AttentionKind.FULL, None),
        ("sliding_window", 0, AttentionKind.FULL, None),
        ("mamba", None, AttentionKind.STATE, None),
        ("encoder_only_attention", None, AttentionKind.IGNORED, None),
        ("cross_attention", None, AttentionKind.IGNORED, None),
    ],
)
def test_a_cache_kind_that_is_not_understood_asks_for_every_block(
    kind: str | None, window: int | None, attention: AttentionKind, window_tokens: int | None
) -> None:
    event = stored(kv_cache_spec_kind=kind, kv_cache_spec_sliding_window=window)
    assert event.spec == GroupSpec(attention, window_tokens, 2)


def test_a_placeholder_has_neither_tokens_nor_size_nor_spec() -> None:
    event = stored(token_ids=[], block_size=0, medium="CPU", group_idx=None)
    assert (len(event.token_ids), event.block_size_tokens, event.spec, event.group) == (0, None, None, 0)
    assert stored(token_ids=[], block_size=0, kv_cache_spec_kind="mamba").spec == GroupSpec(AttentionKind.STATE)


def test_a_sliding_window_event_may_name_no_block() -> None:
    event = stored(block_hashes=[], extra_keys=None)
    assert (event.hashes, len(event.token_ids), event.extras) == ((), 4, None)


# -- extra keys ----------------------------------------------------------------------------------------------------------


def test_no_extra_keys_are_no_extras() -> None:
    assert stored().extras is None
    assert stored(extra_keys=None).extras is None
    assert stored(extra_keys=[None, None]).extras == ((), ())


def test_the_adapters_name_is_dropped_because_the_chain_starts_from_it() -> None:
    assert stored(lora_name="fr", extra_keys=[["fr"], ["fr"]]).extras == ((), ())


def test_a_salt_equal_to_the_adapters_name_survives() -> None:
    assert stored(lora_name="fr", extra_keys=[["fr", "fr"], ["fr"]]).extras == ((Extra(0, "salt", b"fr"),), ())


def test_multimodal_items_keep_their_offset_from_the_block() -> None:
    event = stored(extra_keys=[[["img", 1]], [["img", -1], ("vid", 0)]])
    assert event.extras == ((Extra(1, "mm", b"img"),), (Extra(-1, "mm", b"img"), Extra(0, "mm", b"vid")))


def test_a_string_on_the_first_block_of_a_chain_is_its_salt() -> None:
    assert stored(extra_keys=[[["img", 0], "salt"], None]).extras == (
        (Extra(0, "mm", b"img"), Extra(0, "salt", b"salt")),
        (),
    )
    retained = stored(block_hashes=[2], extra_keys=[["salt"]])  # a sliding window that kept one of two blocks
    assert retained.extras == ((Extra(0, "salt", b"salt"),),)


def test_a_string_anywhere_else_is_opaque() -> None:
    opaque = Extra(0, "opaque", msgspec.msgpack.encode("odd"))
    assert stored(extra_keys=[None, ["odd"]]).extras == ((), (opaque,))
    assert stored(parent_block_hash=5, extra_keys=[["odd"], None]).extras == ((opaque,), ())


def test_a_digest_is_opaque_and_kept_as_it_is() -> None:
    assert stored(extra_keys=[None, [b"\x00\xff"]]).extras == ((), (Extra(0, "opaque", b"\x00\xff"),))


@pytest.mark.parametrize("odd", [7, -3, 1.5, True, None, ["a", "b"], ["img", 1, 2], [1, "img"], {"b": 1, "a": 2}, {1: 2}])
def test_anything_else_is_opaque_and_equal_only_to_itself(odd: Any) -> None:
    (extras, _) = stored(extra_keys=[[odd], None]).extras or ((), ())
    assert [(extra.offset_tokens, extra.kind) for extra in extras] == [(0, "opaque")]
    assert msgspec.msgpack.decode(extras[0].value) == odd


# -- the rest ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "rank"),
    [
        ([1.0, [], 3], 3),
        ([1.0, [["BlockRemoved", [1]]], 0, "more"], 0),
        ([1.0, []], None),
        ([1.0, [], None], None),
        ([1.0, [], "3"], None),
        ([1.0, [], -1], None),
        ([1.0, [], 1 << 40], None),
        ({"a": 1}, None),
        ([], None),
    ],
)
def test_the_rank_is_read_without_the_events(batch: Any, rank: int | None) -> None:
    assert peek_header(msgspec.msgpack.encode(batch)).dp_rank == rank


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x93\x01", b"\x91" * 100_000])
def test_the_rank_of_a_broken_payload_is_none(payload: bytes) -> None:
    assert peek_header(payload).dp_rank is None


def test_decoders_are_found_by_name() -> None:
    assert load_decoder("vllm").name == "vllm"
    with pytest.raises(ConfigError, match="generic, sglang, vllm"):
        load_decoder("trt")
