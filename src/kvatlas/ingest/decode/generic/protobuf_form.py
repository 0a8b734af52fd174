"""The generic format in protobuf: ``kvatlas.v1.EventBatch`` of ``proto/kvatlas/v1/events.proto``.

The batch is split here rather than by protobuf, so that one damaged event does not cost the others and a payload of very many
empty events is refused before they are built.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from google.protobuf.message import DecodeError as ProtobufError

from kvatlas.errors import DecodeError
from kvatlas.ingest.decode.faults import EventFaultError
from kvatlas.ingest.decode.generic.events import VERSION, EventType, GenericEvent
from kvatlas.ingest.decode.limits import DecodeLimits
from kvatlas.proto.kvatlas.v1 import events_pb2

_TYPES = {
    events_pb2.EVENT_TYPE_BLOCK_CREATED: EventType.BLOCK_CREATED,
    events_pb2.EVENT_TYPE_BLOCK_EVICTED: EventType.BLOCK_EVICTED,
    events_pb2.EVENT_TYPE_BLOCK_MIGRATED: EventType.BLOCK_MIGRATED,
    events_pb2.EVENT_TYPE_PREFIX_CACHED: EventType.PREFIX_CACHED,
}
_NUMBERS = {member: number for number, member in _TYPES.items()}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VERSION_TAG = events_pb2.EventBatch.VERSION_FIELD_NUMBER << 3 | _VARINT
_EVENT_TAG = events_pb2.EventBatch.EVENTS_FIELD_NUMBER << 3 | _BYTES


def split(payload: bytes, limits: DecodeLimits) -> list[bytes]:
    """Return a payload's events, raw. Raises DecodeError."""
    version = 0
    events: list[bytes] = []
    at = 0
    while at < len(payload):
        tag, at = _varint(payload, at)
        wire_type = tag & 7
        if wire_type == _VARINT:
            value, at = _varint(payload, at)
            version = value if tag == _VERSION_TAG else version
            continue
        if wire_type == _BYTES:
            size, at = _varint(payload, at)
        elif wire_type in (_FIXED64, _FIXED32):
            size = 8 if wire_type == _FIXED64 else 4
        else:
            raise DecodeError("not_protobuf", f"wire type {wire_type} at byte {at}")
        if size > len(payload) - at:
            raise DecodeError("not_protobuf", f"{size} bytes promised at byte {at} of {len(payload)}")
        if tag == _EVENT_TAG:
            if len(events) == limits.events_max:
                raise DecodeError("oversize", f"more than {limits.events_max} events")
            events.append(payload[at : at + size])
        at += size
    if version != VERSION:
        raise DecodeError("unsupported_version", f"version {version}; this reader knows {VERSION}")
    return events


def _varint(payload: bytes, at: int) -> tuple[int, int]:
    """Return the number at ``at`` and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(payload):
            raise DecodeError("not_protobuf", f"ends inside a number at byte {at}")
        byte = payload[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise DecodeError("not_protobuf", f"a number of more than 10 bytes at byte {at}")


def read(raw: bytes, limits: DecodeLimits) -> GenericEvent:
    """Return one event. Raises EventFaultError."""
    try:
        wire = events_pb2.Event.FromString(raw)
    except ProtobufError as error:
        raise EventFaultError("bad_field", f"event: {str(error)[:200]}") from error
    if wire.type not in _TYPES:
        raise EventFaultError("unknown_event", f"type {wire.type}", harmless=True)
    if len(wire.prefix) > limits.tokens_per_event_max:
        raise EventFaultError("oversize_event", f"prefix: {len(wire.prefix)} tokens")
    return GenericEvent(
        type=_TYPES[wire.type],
        pod_id=wire.pod_id or None,
        block_id=_block_id(wire.block_id),
        parent_block_id=_block_id(wire.parent_block_id),
        prefix=array("I", wire.prefix),
        timestamp_s=wire.timestamp if wire.HasField("timestamp") else None,
        block_size_tokens=wire.block_size if wire.HasField("block_size") else None,
        tier=wire.tier or None,
        model=wire.model or None,
        lora_name=wire.lora_name or None,
        dp_rank=wire.dp_rank if wire.HasField("dp_rank") else None,
        group=wire.group if wire.HasField("group") else None,
        from_tier=wire.from_tier or None,
        to_tier=wire.to_tier or None,
        to_pod_id=wire.to_pod_id or None,
        to_dp_rank=wire.to_dp_rank if wire.HasField("to_dp_rank") else None,
    )


def _block_id(wire: events_pb2.BlockId) -> int | bytes | str | None:
    match wire.WhichOneof("id"):
        case "number":
            return wire.number
        case "digest":
            return wire.digest
        case "name":
            return wire.name
    return None


def encode(events: Sequence[GenericEvent]) -> bytes:
    """Return a payload of the events, in order."""
    return events_pb2.EventBatch(version=VERSION, events=map(_wire, events)).SerializeToString()


def _wire(event: GenericEvent) -> events_pb2.Event:
    return events_pb2.Event(
        type=_NUMBERS[event.type],
        pod_id=event.pod_id or "",
        block_id=_wire_id(event.block_id),
        parent_block_id=_wire_id(event.parent_block_id),
        prefix=event.prefix,
        timestamp=event.timestamp_s,
        block_size=event.block_size_tokens,
        tier=event.tier or "",
        model=event.model or "",
        lora_name=event.lora_name or "",
        dp_rank=event.dp_rank,
        group=event.group,
        from_tier=event.from_tier or "",
        to_tier=event.to_tier or "",
        to_pod_id=event.to_pod_id or "",
        to_dp_rank=event.to_dp_rank,
    )


def _wire_id(block_id: int | bytes | str | None) -> events_pb2.BlockId | None:
    if block_id is None:
        return None
    if isinstance(block_id, int):
        return events_pb2.BlockId(number=block_id & (1 << 64) - 1)
    if isinstance(block_id, bytes):
        return events_pb2.BlockId(digest=block_id)
    return events_pb2.BlockId(name=block_id)
