"""The generic format's events, before they are bytes and after."""

from __future__ import annotations

import enum
import sys
from array import array
from collections.abc import Sequence

import msgspec
import xxhash

from kvatlas.ingest.decode.fields import engine_hash
from kvatlas.types import EngineHash

VERSION = 1
"""Of the format. A reader refuses any other."""

_CHAIN_TAG = b"kvatlas.generic/1"


class EventType(enum.Enum):
    """What happened; the value is the name in msgpack."""

    BLOCK_CREATED = "BlockCreated"
    BLOCK_EVICTED = "BlockEvicted"
    BLOCK_MIGRATED = "BlockMigrated"
    PREFIX_CACHED = "PrefixCached"


class GenericEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a source of one's own; which fields a type needs is told in :mod:`kvatlas.ingest.decode.generic`.

    ``pod_id`` None: the pod that the payload comes from. ``prefix``: token ids, of the block or of the prompt up to its end.
    ``timestamp_s``: unix time. Tiers: ``gpu`` (where None), ``cpu``, ``disk``, ``storage`` or a name of one's own.
    """

    type: EventType
    pod_id: str | None = None
    block_id: int | bytes | str | None = None
    parent_block_id: int | bytes | str | None = None
    prefix: array[int] = msgspec.field(default_factory=lambda: array("I"))
    timestamp_s: float | None = None
    block_size_tokens: int | None = None
    tier: str | None = None
    model: str | None = None
    lora_name: str | None = None
    dp_rank: int | None = None
    group: int | None = None
    from_tier: str | None = None
    to_tier: str | None = None
    to_pod_id: str | None = None
    to_dp_rank: int | None = None


def block_hash(block_id: int | bytes | str) -> EngineHash:
    """Return the 64 bits that stand for a block id: of a number its bits, of a digest its end, of a name its XXH3-64."""
    if isinstance(block_id, str):
        return EngineHash(xxhash.xxh3_64_intdigest(block_id.encode()))
    return engine_hash(block_id)


def prefix_hashes(
    prefix: Sequence[int], block_size_tokens: int, *, model: str | None = None, lora_name: str | None = None
) -> list[EngineHash]:
    """Return the engine hash of every whole block of a prefix whose source names no blocks.

        hash_i = XXH3-64( LE64(hash_{i-1}) || LE32(token) for each token of block i )
        hash_{-1} = XXH3-64( "kvatlas.generic/1" || LE32(len(model)) || model || LE32(len(lora)) || lora )

    They depend on nothing but the arguments, so any later event that tells the same prefix names the same blocks. They are no
    block keys and never equal one but by chance: those start from another tag.
    """
    names = [(name or "").encode() for name in (model, lora_name)]
    chain = xxhash.xxh3_64_intdigest(_CHAIN_TAG + b"".join(len(name).to_bytes(4, "little") + name for name in names))
    tokens = array("I", prefix)
    if sys.byteorder == "big":
        tokens.byteswap()
    view = memoryview(tokens).cast("B")
    size_bytes = block_size_tokens * tokens.itemsize
    hashes = []
    for end in range(size_bytes, len(view) + 1, size_bytes):
        chain = xxhash.xxh3_64_intdigest(chain.to_bytes(8, "little") + view[end - size_bytes : end])
        hashes.append(EngineHash(chain))
    return hashes
