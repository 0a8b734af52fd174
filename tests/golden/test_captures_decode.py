"""What a real vLLM 0.32 sent is read whole, in every capture, and says what another reader counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvatlas.ingest.decode import peek_header
from kvatlas.ingest.decode.vllm import VllmDecoder
from kvatlas.ingest.recording import read_frames
from kvatlas.types import AllBlocksCleared, AttentionKind, BlockRemoved, BlockStored, Event, Frame, GroupSpec

DATA = Path(__file__).parents[1] / "data" / "vllm-0.32"
CAPTURES = sorted(path.name for path in DATA.glob("*.bin"))
LIVE = [name for name in CAPTURES if not name.endswith(".replay.bin")]
REPLAYS = [name for name in CAPTURES if name.endswith(".replay.bin")]

Kind = tuple[str, str, int]

COUNTS: dict[str, dict[Kind, int]] = {
    "base-sha256_cbor.bin": {("stored", "gpu", 0): 52, ("removed", "gpu", 0): 73, ("cleared", "", 0): 3},
    "hybrid-gemma3.bin": {
        ("stored", "gpu", 0): 19,
        ("stored", "gpu", 1): 19,
        ("stored", "gpu", 2): 19,
        ("stored", "gpu", 3): 19,
        ("removed", "gpu", 0): 18,
        ("removed", "gpu", 1): 18,
        ("removed", "gpu", 2): 18,
        ("removed", "gpu", 3): 38,
        ("cleared", "", 0): 1,
    },
    "offload-cpu-placeholder-events.bin": {
        ("stored", "gpu", 0): 18,
        ("stored", "cpu", 0): 186,
        ("removed", "gpu", 0): 120,
        ("removed", "cpu", 0): 2,
        ("cleared", "", 0): 2,
    },
    "offload-tiering-fs.bin": {
        ("stored", "gpu", 0): 18,
        ("stored", "cpu", 0): 196,
        ("stored", "storage", 0): 166,
        ("removed", "gpu", 0): 120,
        ("removed", "cpu", 0): 31,
        ("cleared", "", 0): 2,
    },
    "dp2-rank1.bin": {("stored", "gpu", 0): 5, ("cleared", "", 0): 1},
}
"""Counted from the raw msgpack with another reader (msgpack-python), by (type, medium, group_idx)."""


def frames(name: str) -> list[Frame]:
    return list(read_frames(DATA / name))


def events(name: str) -> list[Event]:
    decoder = VllmDecoder()
    return [event for frame in frames(name) for batch in decoder.decode(frame.payload).batches for event in batch.events]


def kind(event: Event) -> Kind:
    if isinstance(event, AllBlocksCleared):
        return ("cleared", event.tier or "", 0)
    return ("stored" if isinstance(event, BlockStored) else "removed", event.tier, event.group or 0)


@pytest.mark.parametrize("name", CAPTURES)
def test_every_payload_is_read_without_faults(name: str) -> None:
    decoder = VllmDecoder()
    captured = frames(name)
    assert [frame.seq for frame in captured] == list(range(len(captured)))
    for frame in captured:
        decoded = decoder.decode(frame.payload)
        assert decoded.faults == ()
        (batch,) = decoded.batches
        assert batch.timestamp_s is not None
        assert abs(batch.timestamp_s - frame.received_ns / 1e9) < 3600
        assert batch.dp_rank == peek_header(frame.payload).dp_rank == (1 if "rank1" in name else 0)


@pytest.mark.parametrize("name", COUNTS)
def test_the_events_are_those_that_another_reader_counts(name: str) -> None:
    assert dict(Counter(kind(event) for event in events(name))) == COUNTS[name]


@pytest.mark.parametrize("name", LIVE)
def test_the_older_array_form_of_the_same_events_reads_the_same(name: str) -> None:
    decoder = VllmDecoder()
    for frame in frames(name):
        assert decoder.decode(as_arrays(frame.payload)) == decoder.decode(frame.payload)


def as_arrays(payload: bytes) -> bytes:
    """The payload as a vLLM with positional events would have sent it."""
    order = {
        "BlockStored": [
            "block_hashes",
            "parent_block_hash",
            "token_ids",
            "block_size",
            "lora_id",
            "medium",
            "lora_name",
            "extra_keys",
            "group_idx",
            "kv_cache_spec_kind",
            "kv_cache_spec_sliding_window",
            "locality",
            "ownership",
            "session_id",
        ],
        "BlockRemoved": ["block_hashes", "medium", "group_idx", "locality", "ownership"],
        "AllBlocksCleared": [],
    }
    batch: list[Any] = msgspec.msgpack.decode(payload)
    batch[1] = [trimmed([event["type"], *(event.get(key) for key in order[event["type"]])]) for event in batch[1]]
    return msgspec.msgpack.encode(batch)


def trimmed(fields: list[Any]) -> list[Any]:
    """Without trailing defaults, which positional events leave out."""
    while fields[-1] is None:
        fields = fields[:-1]
    return fields


def test_raw_digests_name_blocks_as_integers_do() -> None:
    """Both runs had the same requests and hash algorithm; only the setting of what to publish differed."""
    digests = events("base-sha256_cbor-raw-bytes-hashes.bin")
    integers = events("base-sha256_cbor.bin")
    assert digests == integers[: len(digests)]
    for frame in frames("base-sha256_cbor-raw-bytes-hashes.bin")[:3]:
        for event in msgspec.msgpack.decode(frame.payload)[1]:
            assert all(len(digest) == 32 for digest in event.get("block_hashes", []))


@pytest.mark.parametrize("name", REPLAYS)
def test_a_replay_is_what_was_sent_live(name: str) -> None:
    live = {frame.seq: (frame.topic, frame.payload) for frame in frames(name.replace(".replay", ""))}
    assert all(live[frame.seq] == (frame.topic, frame.payload) for frame in frames(name))


def test_a_salt_is_on_the_first_block_of_its_chain_only() -> None:
    salted = [
        event for event in events("truth-base.bin") if isinstance(event, BlockStored) and event.extras and any(event.extras)
    ]
    assert salted
    for event in salted:
        assert event.extras is not None
        assert event.parent is None
        assert [[extra.kind for extra in extras] for extras in event.extras] == [["salt"], *[[]] * (len(event.hashes) - 1)]


def test_the_groups_of_a_hybrid_model_say_how_they_cache() -> None:
    specs = {(event.group, event.spec) for event in events("hybrid-gemma3-retention64.bin") if isinstance(event, BlockStored)}
    window = GroupSpec(AttentionKind.SLIDING_WINDOW, 64, 32)
    assert specs == {(0, window), (1, window), (2, window), (3, GroupSpec(AttentionKind.FULL, None, 32))}


def test_sliding_window_groups_name_fewer_blocks_than_their_tokens_fill() -> None:
    sparse = [
        event
        for event in events("hybrid-gemma3.bin")
        if isinstance(event, BlockStored) and len(event.hashes) * 32 != len(event.token_ids)
    ]
    assert sparse
    assert {event.spec.kind for event in sparse if event.spec} == {AttentionKind.SLIDING_WINDOW}


def test_offloaded_blocks_come_with_or_without_their_tokens() -> None:
    def offloaded(name: str) -> list[BlockStored]:
        return [event for event in events(name) if isinstance(event, BlockStored) and event.tier == "cpu"]

    assert all(
        not event.token_ids and event.block_size_tokens is None for event in offloaded("offload-cpu-placeholder-events.bin")
    )
    assert all(len(event.token_ids) == 32 for event in offloaded("offload-cpu-self-describing.bin"))


def test_a_removal_on_the_device_names_one_block() -> None:
    removals = [event for event in events("truth-hybrid64.bin") if isinstance(event, BlockRemoved)]
    assert {(event.tier, len(event.hashes)) for event in removals} == {("gpu", 1)}
