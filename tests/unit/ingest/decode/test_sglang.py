"""SGLang's payloads as its versions sent them (srt/disaggregation/kv_events.py), and how they differ from vLLM's."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvatlas.ingest.decode import load_decoder
from kvatlas.ingest.decode.sglang import SglangDecoder
from kvatlas.types import AllBlocksCleared, BlockRemoved, BlockStored, DecodedPayload, Event, Extra

FIRST = ["BlockStored", [-5, 6], None, [1, 2, 3, 4], 2, None]
"""The oldest layout; each later one adds to it."""
U64 = 1 << 64


def decode(*events: Any) -> DecodedPayload:
    return SglangDecoder().decode(msgspec.msgpack.encode([1.0, list(events), 1]))


def only(event: Any) -> Event:
    decoded = decode(event)
    assert decoded.faults == ()
    return decoded.batches[0].events[0]


def stored(event: Any) -> BlockStored:
    read = only(event)
    assert isinstance(read, BlockStored)
    return read


def test_signed_hashes_are_the_same_bits() -> None:
    event = stored(FIRST)
    assert event.hashes == (U64 - 5, 6)
    assert only(["BlockRemoved", [-5]]) == BlockRemoved(hashes=(U64 - 5,))  # type: ignore[arg-type]


def test_the_attention_rank_is_the_batchs_rank() -> None:
    assert decode().batches[0].dp_rank == 1


@pytest.mark.parametrize(
    ("medium", "tier"),
    [
        ("GPU", "gpu"),
        ("CPU_PINNED", "cpu"),
        ("HOST", "cpu"),
        ("DISK", "disk"),
        ("EXTERNAL", "storage"),
        ("CXL", "cxl"),
        (None, "gpu"),
    ],
)
def test_media_are_normalised(medium: str | None, tier: str) -> None:
    assert stored([*FIRST, medium]).tier == tier
    assert only(["BlockRemoved", [1], medium]) == BlockRemoved(hashes=(1,), tier=tier)  # type: ignore[arg-type]


def test_a_salt_behind_the_medium_is_the_first_blocks() -> None:
    event = stored([*FIRST, "GPU", {"cache_salt": "tenant"}])
    assert (event.extras, event.lora_name) == (((Extra(0, "salt", b"tenant"),), ()), None)


def test_a_salt_told_twice_counts_once() -> None:
    long_layout = [
        *FIRST,
        "GPU",
        None,
        [["dynamo-cache-salt:tenant"], None],
        None,
        None,
        None,
        None,
        None,
        {"cache_salt": "tenant"},
    ]
    assert stored(long_layout).extras == ((Extra(0, "salt", b"tenant"),), ())


def test_a_salt_repeated_on_later_blocks_is_in_the_chain_already() -> None:
    event = stored(["BlockStored", [7], 6, [1, 2], 2, None, "GPU", {"cache_salt": "tenant"}])
    assert event.extras is None


def test_the_newest_maps_are_read() -> None:
    event = stored(
        {
            "type": "BlockStored",
            "block_hashes": [-5, 6],
            "parent_block_hash": None,
            "token_ids": [1, 2, 3, 4],
            "block_size": 2,
            "lora_id": None,
            "medium": "CPU_PINNED",
            "cache_salt": "tenant",
            "session_id": "s",
            "lora_name": "fr",
            "namespaced_block_hashes": [1, 2],
        }
    )
    assert (event.hashes, event.tier, event.lora_name, event.session_id) == ((U64 - 5, 6), "cpu", "fr", "s")
    assert event.extras == ((Extra(0, "salt", b"tenant"),), ())


def test_a_removals_trailing_fields_are_those_of_a_store() -> None:
    event = only(["BlockRemoved", [1], "GPU", 2, "sliding_window", 64, "LOCAL", "x"])
    assert event == BlockRemoved(hashes=(1,), group=2, locality="LOCAL", ownership="x")  # type: ignore[arg-type]


def test_a_clears_owner_is_not_taken_for_a_medium() -> None:
    assert only(["AllBlocksCleared"]) == AllBlocksCleared()
    assert only(["AllBlocksCleared", None]) == AllBlocksCleared()
    assert only(["AllBlocksCleared", "mooncake"]) == AllBlocksCleared()


def test_token_pairs_of_eagle_are_a_fault_that_says_so() -> None:
    decoded = decode(["BlockStored", [1], None, [[1, 2], [2, 3]], 2, None, "GPU"], FIRST)
    (fault,) = decoded.faults
    assert (fault.reason, fault.harmless) == ("bad_tokens", False)
    assert "EAGLE" in fault.detail
    assert len(decoded.batches[0].events) == 1


def test_the_decoder_is_found_by_name() -> None:
    assert load_decoder("sglang").name == "sglang"
