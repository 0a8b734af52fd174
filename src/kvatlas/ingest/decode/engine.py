"""The reader that vLLM's and SGLang's decoders share: payload bytes to events.

Three steps. The whole payload is skimmed (so that no later step meets a surprise in its structure), then split into raw
events, then each event is read on its own: what is wrong with one does not cost the others.
"""

from __future__ import annotations

import math

import msgspec

from kvatlas.errors import DecodeError
from kvatlas.ingest.decode import fields, wire
from kvatlas.ingest.decode.extras import Block0, ExtrasBudget, read_extras
from kvatlas.ingest.decode.faults import EventFaultError, FaultLog
from kvatlas.ingest.decode.header import DP_RANK_MAX
from kvatlas.ingest.decode.limits import DecodeLimits
from kvatlas.ingest.decode.msgpack import UNREADABLE, NotMsgpackError, array_length, explain, is_map, is_nil, skim
from kvatlas.types import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    DecodedPayload,
    DecodeFault,
    DpRank,
    Event,
    EventBatch,
    GroupIdx,
)

_BATCH = msgspec.msgpack.Decoder(wire.Batch)
_RAWS = msgspec.msgpack.Decoder(list[msgspec.Raw])
_NUMBER = msgspec.msgpack.Decoder(float | int | None)
_RANK = msgspec.msgpack.Decoder(int | None)
_TAGGED_MAP = msgspec.msgpack.Decoder(wire.TaggedMap)
_TAGGED_ARRAY = msgspec.msgpack.Decoder(wire.TaggedArray)

_EVENT_TYPES = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})


def decode_payload(payload: bytes, arrays: msgspec.msgpack.Decoder[wire.AnyEvent], limits: DecodeLimits) -> DecodedPayload:
    """Return what a ``[timestamp, [events], rank]`` payload says. ``arrays``: the engine's order of positional fields.

    Raises DecodeError: ``oversize``, ``not_msgpack`` or ``not_a_batch``. Faults of single events: ``unknown_event``
    (harmless), ``not_an_event``, ``bad_field``, ``bad_hash``, ``bad_tokens``, ``bad_block_size``, ``bad_extra_keys``,
    ``extra_keys_length``, ``oversize_event``; of the batch: ``bad_timestamp`` (harmless), ``bad_dp_rank``; ``more_faults``.
    """
    batch = _split(payload, limits)
    log = FaultLog(limits.faults_max)
    timestamp_s = _timestamp(batch.ts, log)
    dp_rank = _dp_rank(batch.dp_rank, log)
    events: list[Event] = []
    reader = _EventReader(arrays, limits)
    for raw in _RAWS.decode(batch.events):
        try:
            events.append(reader.read(raw))
        except EventFaultError as error:
            log.add(error.fault)
    return DecodedPayload((EventBatch(tuple(events), timestamp_s, dp_rank),), log.faults())


def _split(payload: bytes, limits: DecodeLimits) -> wire.Batch:
    if len(payload) > limits.payload_bytes_max:
        raise DecodeError("oversize", f"{len(payload)} bytes; at most {limits.payload_bytes_max} are read")
    try:
        skim(payload)
    except NotMsgpackError as error:
        raise DecodeError("not_msgpack", str(error)) from error
    try:
        batch = _BATCH.decode(payload)
    except UNREADABLE as error:
        raise DecodeError("not_a_batch", explain(error)) from error
    count = array_length(batch.events)
    if count is None:
        raise DecodeError("not_a_batch", "the second element is not an array of events")
    if count > limits.events_max:
        raise DecodeError("oversize", f"{count} events; at most {limits.events_max} are read")
    return batch


def _timestamp(raw: msgspec.Raw, log: FaultLog) -> float | None:
    try:
        value = _NUMBER.decode(raw)
    except UNREADABLE as error:
        raise DecodeError("not_a_batch", f"the first element is not a time: {explain(error)}") from error
    if value is None or math.isfinite(value):
        return None if value is None else float(value)
    log.add(DecodeFault("bad_timestamp", f"{value}", harmless=True))
    return None


def _dp_rank(raw: msgspec.Raw, log: FaultLog) -> DpRank | None:
    """An unreadable rank is not harmless: whose events these are is then known from the endpoint alone."""
    if is_nil(raw):
        return None
    try:
        value = _RANK.decode(raw)
    except UNREADABLE as error:
        log.add(DecodeFault("bad_dp_rank", explain(error)))
        return None
    if value is None or not 0 <= value <= DP_RANK_MAX:
        log.add(DecodeFault("bad_dp_rank", f"{value}"))
        return None
    return DpRank(value)


class _EventReader:
    """Reads the events of one payload, one by one."""

    def __init__(self, arrays: msgspec.msgpack.Decoder[wire.AnyEvent], limits: DecodeLimits) -> None:
        self._arrays = arrays
        self._limits = limits
        self._extras_budget = ExtrasBudget(limits)

    def read(self, raw: msgspec.Raw) -> Event:
        """Return one event, or raise EventFaultError."""
        in_map = is_map(raw)
        try:
            event = (wire.MAPS if in_map else self._arrays).decode(raw)
        except UNREADABLE as error:
            raise _why_unreadable(raw, in_map, error) from error
        if isinstance(event, wire.StoredFields):
            return self._stored(event)
        if isinstance(event, wire.RemovedFields | wire.SglangRemovedArray):
            return self._removed(event)
        return AllBlocksCleared(fields.tier(event.medium, self._limits) if event.medium else None)

    def _stored(self, event: wire.StoredFields) -> BlockStored:
        limits = self._limits
        hashes = fields.read_hashes(event.block_hashes, limits)
        parent = fields.read_parent(event.parent_block_hash)
        tokens = fields.read_tokens(event.token_ids, limits)
        size = fields.block_size(event.block_size, tokens, limits)
        plain_name = event.lora_name if isinstance(event.lora_name, str) else None
        lora_name = fields.adapter(plain_name, event.lora_id, limits)
        block0 = Block0(parent is None, event.salt() or None)
        return BlockStored(
            hashes=hashes,
            parent=parent,
            token_ids=tokens,
            block_size_tokens=size,
            tier=fields.tier(event.medium, limits),
            group=fields.group(event.group_idx) or GroupIdx(0),
            spec=fields.group_spec(event.kv_cache_spec_kind, event.kv_cache_spec_sliding_window, size),
            lora_name=lora_name,
            extras=read_extras(event.extra_keys, len(hashes), lora_name, block0, self._extras_budget),
            session_id=fields.text(event.session(), "session_id", limits),
            locality=fields.text(event.locality, "locality", limits),
            ownership=fields.text(event.ownership, "ownership", limits),
        )

    def _removed(self, event: wire.AnyRemoved | wire.RemovedFields) -> BlockRemoved:
        limits = self._limits
        return BlockRemoved(
            hashes=fields.read_hashes(event.block_hashes, limits),
            tier=fields.tier(event.medium, limits),
            group=fields.group(event.group_idx),
            locality=fields.text(event.locality, "locality", limits),
            ownership=fields.text(event.ownership, "ownership", limits),
        )


def _why_unreadable(raw: msgspec.Raw, in_map: bool, error: Exception) -> EventFaultError:
    """Tell an event of an unknown type, which changes nothing we know of, from a damaged one of a known type."""
    try:
        tag = (_TAGGED_MAP if in_map else _TAGGED_ARRAY).decode(raw).type
    except UNREADABLE as untagged:
        return EventFaultError("not_an_event", explain(untagged))
    if tag in _EVENT_TYPES:
        return EventFaultError("bad_field", f"{tag}: {explain(error)}")
    return EventFaultError("unknown_event", f"type {tag[:64]!r}", harmless=True)
