"""The generic format in msgpack: ``{"kvatlas": 1, "events": [{"type": "BlockCreated", "block_id": ..., ...}, ...]}``."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvatlas.errors import DecodeError
from kvatlas.ingest.decode.faults import EventFaultError
from kvatlas.ingest.decode.fields import read_tokens
from kvatlas.ingest.decode.generic.events import VERSION, EventType, GenericEvent
from kvatlas.ingest.decode.limits import DecodeLimits
from kvatlas.ingest.decode.msgpack import NIL, UNREADABLE, NotMsgpackError, array_length, explain, skim

_NO_TOKENS = msgspec.Raw(b"\x90")


class _Envelope(msgspec.Struct):
    kvatlas: int
    events: msgspec.Raw = _NO_TOKENS


class _Fields(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An event on the wire; unknown keys are ignored. Tokens stay raw until they were counted, ids because of their types."""

    type: str
    pod_id: str | None = None
    block_id: msgspec.Raw = NIL
    parent_block_id: msgspec.Raw = NIL
    prefix: msgspec.Raw = _NO_TOKENS
    timestamp: float | None = None
    block_size: int | None = None
    tier: str | None = None
    model: str | None = None
    lora_name: str | None = None
    dp_rank: int | None = None
    group: int | None = None
    from_tier: str | None = None
    to_tier: str | None = None
    to_pod_id: str | None = None
    to_dp_rank: int | None = None


_ENVELOPE = msgspec.msgpack.Decoder(_Envelope)
_RAWS = msgspec.msgpack.Decoder(list[msgspec.Raw])
_FIELDS = msgspec.msgpack.Decoder(_Fields)
_TYPES = {member.value: member for member in EventType}


def split(payload: bytes, limits: DecodeLimits) -> list[msgspec.Raw]:
    """Return a payload's events, raw. Raises DecodeError."""
    try:
        skim(payload)
    except NotMsgpackError as error:
        raise DecodeError("not_msgpack", str(error)) from error
    try:
        envelope = _ENVELOPE.decode(payload)
    except UNREADABLE as error:
        raise DecodeError("not_a_batch", explain(error)) from error
    if envelope.kvatlas != VERSION:
        raise DecodeError("unsupported_version", f"version {envelope.kvatlas}; this reader knows {VERSION}")
    count = array_length(envelope.events)
    if count is None:
        raise DecodeError("not_a_batch", "events: not an array")
    if count > limits.events_max:
        raise DecodeError("oversize", f"{count} events; at most {limits.events_max} are read")
    return _RAWS.decode(envelope.events)


def read(raw: msgspec.Raw, limits: DecodeLimits) -> GenericEvent:
    """Return one event. Raises EventFaultError."""
    try:
        wire = _FIELDS.decode(raw)
    except UNREADABLE as error:
        raise EventFaultError("bad_field", explain(error)) from error
    if wire.type not in _TYPES:
        raise EventFaultError("unknown_event", f"type {wire.type[:64]!r}", harmless=True)
    return GenericEvent(
        type=_TYPES[wire.type],
        pod_id=wire.pod_id,
        block_id=_block_id(wire.block_id, limits),
        parent_block_id=_block_id(wire.parent_block_id, limits),
        prefix=read_tokens(wire.prefix, limits),
        timestamp_s=wire.timestamp,
        block_size_tokens=wire.block_size,
        tier=wire.tier,
        model=wire.model,
        lora_name=wire.lora_name,
        dp_rank=wire.dp_rank,
        group=wire.group,
        from_tier=wire.from_tier,
        to_tier=wire.to_tier,
        to_pod_id=wire.to_pod_id,
        to_dp_rank=wire.to_dp_rank,
    )


def _block_id(raw: msgspec.Raw, limits: DecodeLimits) -> int | bytes | str | None:
    if len(memoryview(raw)) > limits.text_bytes_max:
        raise EventFaultError("bad_hash", f"block id: {len(memoryview(raw))} bytes; at most {limits.text_bytes_max} are read")
    try:
        value = msgspec.msgpack.decode(raw)
    except UNREADABLE as error:
        raise EventFaultError("bad_hash", f"block id: {explain(error)}") from error
    if value is None or isinstance(value, bytes | str) or type(value) is int:
        return value
    raise EventFaultError("bad_hash", f"block id: a {type(value).__name__} is no number, digest or name")


def encode(events: Sequence[GenericEvent]) -> bytes:
    """Return a payload of the events, in order."""
    return msgspec.msgpack.encode({"kvatlas": VERSION, "events": [_wire(event) for event in events]})


def _wire(event: GenericEvent) -> _Fields:
    return _Fields(
        type=event.type.value,
        pod_id=event.pod_id,
        block_id=_raw(event.block_id),
        parent_block_id=_raw(event.parent_block_id),
        prefix=_raw(event.prefix.tolist()),
        timestamp=event.timestamp_s,
        block_size=event.block_size_tokens,
        tier=event.tier,
        model=event.model,
        lora_name=event.lora_name,
        dp_rank=event.dp_rank,
        group=event.group,
        from_tier=event.from_tier,
        to_tier=event.to_tier,
        to_pod_id=event.to_pod_id,
        to_dp_rank=event.to_dp_rank,
    )


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))
