"""What a payload says about itself, read without its events."""

from __future__ import annotations

import math

import msgspec

from kvatlas.ingest.decode import wire
from kvatlas.ingest.decode.msgpack import UNREADABLE
from kvatlas.types import DpRank

DP_RANK_MAX = 0xFFFF

_BATCH = msgspec.msgpack.Decoder(wire.Batch)
_TIMESTAMP = msgspec.msgpack.Decoder(float | int | None)
_DP_RANK = msgspec.msgpack.Decoder(int | None)


class Header(msgspec.Struct, frozen=True):
    """``timestamp_s``: the engine's clock, unix seconds. None where the payload does not say, or is none of an engine's."""

    timestamp_s: float | None = None
    dp_rank: DpRank | None = None


def peek_header(payload: bytes) -> Header:
    """Return the header of a vLLM or SGLang payload; what is odd in it is None. Never raises."""
    try:
        batch = _BATCH.decode(payload)
    except UNREADABLE:
        return Header()
    return Header(_timestamp(batch.ts), _dp_rank(batch.dp_rank))


def _timestamp(raw: msgspec.Raw) -> float | None:
    try:
        value = _TIMESTAMP.decode(raw)
    except UNREADABLE:
        return None
    return float(value) if value is not None and math.isfinite(value) else None


def _dp_rank(raw: msgspec.Raw) -> DpRank | None:
    try:
        value = _DP_RANK.decode(raw)
    except UNREADABLE:
        return None
    return DpRank(value) if value is not None and 0 <= value <= DP_RANK_MAX else None
