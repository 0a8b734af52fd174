"""What a payload says about itself, read without its events."""

from __future__ import annotations

import msgspec

from kvatlas.types import DpRank

_DP_RANK_MAX = 65_535


class Header(msgspec.Struct, frozen=True):
    """``timestamp_s``: the engine's clock, unix seconds. None where the payload does not say, or is none of an engine's."""

    timestamp_s: float | None = None
    dp_rank: DpRank | None = None


class _Batch(msgspec.Struct, array_like=True):
    timestamp: msgspec.Raw
    events: msgspec.Raw
    dp_rank: msgspec.Raw = msgspec.Raw(b"\xc0")


_BATCH = msgspec.msgpack.Decoder(_Batch)
_TIMESTAMP = msgspec.msgpack.Decoder(float | None)
_DP_RANK = msgspec.msgpack.Decoder(int | None)
_NOTHING = Header()


def peek_header(payload: bytes) -> Header:
    """Return the header of a vLLM or SGLang payload; an empty one for anything else. Never raises."""
    try:
        batch = _BATCH.decode(payload)
        rank = _DP_RANK.decode(batch.dp_rank)
        timestamp_s = _TIMESTAMP.decode(batch.timestamp)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return _NOTHING
    return Header(timestamp_s, DpRank(rank) if rank is not None and 0 <= rank <= _DP_RANK_MAX else None)
