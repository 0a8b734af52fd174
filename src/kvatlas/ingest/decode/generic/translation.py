"""Generic events to events of the index. What each becomes is told in :mod:`kvatlas.ingest.decode.generic`."""

from __future__ import annotations

import math
from array import array

import msgspec

from kvatlas.ingest.decode import fields
from kvatlas.ingest.decode.faults import EventFaultError
from kvatlas.ingest.decode.generic.events import EventType, GenericEvent, block_hash, prefix_hashes
from kvatlas.ingest.decode.limits import DecodeLimits
from kvatlas.types import BlockRemoved, BlockStored, DpRank, EngineHash, Event, EventBatch, GroupIdx, PodId, Tier

_RANK_MAX = 0xFFFF


class Origin(msgspec.Struct, frozen=True):
    """Whose events may share a batch."""

    pod: PodId | None
    dp_rank: DpRank | None
    model: str | None


class Translation:
    """Turns generic events into batches, one after the other: neighbours of one origin share a batch."""

    def __init__(self, limits: DecodeLimits, block_size_tokens: int) -> None:
        self._limits = limits
        self._block_size_tokens = block_size_tokens
        self._hashes_left = limits.hashes_per_event_max
        self._batches: list[tuple[Origin, list[Event], list[float]]] = []

    def add(self, event: GenericEvent) -> None:
        """Take one event. Raises EventFaultError, and then nothing of it was taken."""
        time_s = event.timestamp_s
        if time_s is not None and not math.isfinite(time_s):
            raise EventFaultError("bad_field", f"timestamp: {time_s}")
        for origin, read in self._read(event):
            if not self._batches or self._batches[-1][0] != origin:
                self._batches.append((origin, [], []))
            self._batches[-1][1].append(read)
            if time_s is not None:
                self._batches[-1][2].append(time_s)

    def batches(self) -> tuple[EventBatch, ...]:
        """Return the batches in order; each has the time of its last event that has one."""
        return tuple(
            EventBatch(tuple(events), times_s[-1] if times_s else None, origin.dp_rank, origin.pod, origin.model)
            for origin, events, times_s in self._batches
        )

    def _read(self, event: GenericEvent) -> list[tuple[Origin, Event]]:
        here = self._origin(event.pod_id, event.dp_rank, event.model)
        match event.type:
            case EventType.BLOCK_CREATED:
                return [(here, read) for read in self._created(event, self._named(event), event.tier)]
            case EventType.BLOCK_EVICTED:
                return [(here, self._removed(event, (self._named(event),), event.tier))]
            case EventType.BLOCK_MIGRATED:
                return self._migrated(event, here)
            case EventType.PREFIX_CACHED:
                return [(here, read) for read in self._cached(event)]

    def _migrated(self, event: GenericEvent, here: Origin) -> list[tuple[Origin, Event]]:
        """The copy appears before the old one goes: nobody who looks in between sees a block that nobody holds."""
        there = here if event.to_pod_id is None else self._origin(event.to_pod_id, event.to_dp_rank, event.model)
        to_tier = event.to_tier or (event.from_tier if event.to_pod_id else None)
        if to_tier is None and event.to_pod_id is None:
            raise EventFaultError("missing_field", "to_tier or to_pod_id: where a block has moved")
        if there == here and self._tier(to_tier) == self._tier(event.from_tier):
            raise EventFaultError("bad_field", "to_tier: a block that moves to where it is")
        block = self._named(event)
        arrivals: list[tuple[Origin, Event]] = [(there, read) for read in self._created(event, block, to_tier)]
        return [*arrivals, (here, self._removed(event, (block,), event.from_tier))]

    def _created(self, event: GenericEvent, block: EngineHash, tier: str | None) -> list[Event]:
        """One block is stored; if only its whole prefix is told, the blocks before it are taught and taken back at once."""
        parent = None if event.parent_block_id is None else block_hash(event.parent_block_id)
        if not event.prefix:
            return [self._stored(event, (block,), tier, parent=parent, tokens=event.prefix, size=None)]
        size = self._size(event, self._block_size_tokens if event.block_id is None else len(event.prefix))
        _check_whole(event, size)
        if parent is not None or len(event.prefix) == size:
            return [self._stored(event, (block,), tier, parent=parent, tokens=event.prefix[-size:], size=size)]
        before = tuple(self._hashes(event, size)[:-1])
        return [
            self._stored(event, (*before, block), tier, parent=None, tokens=event.prefix, size=size),
            self._removed(event, before, tier, GroupIdx(0)),
        ]

    def _cached(self, event: GenericEvent) -> list[Event]:
        """Every block of the prefix is held once, however often that is said: so a copy goes before one comes."""
        size = self._size(event, self._block_size_tokens)
        hashes = tuple(self._hashes(event, size))
        if not hashes:
            return []  # shorter than a block: nothing that could be found again
        tokens = event.prefix[: len(hashes) * size]
        return [
            self._removed(event, hashes, event.tier, GroupIdx(0)),
            self._stored(event, hashes, event.tier, parent=None, tokens=tokens, size=size),
        ]

    def _stored(
        self,
        event: GenericEvent,
        hashes: tuple[EngineHash, ...],
        tier: str | None,
        *,
        parent: EngineHash | None,
        tokens: array[int],
        size: int | None,
    ) -> BlockStored:
        return BlockStored(
            hashes=hashes,
            parent=parent,
            token_ids=tokens,
            block_size_tokens=size,
            tier=self._tier(tier),
            group=fields.group(event.group) or GroupIdx(0),
            spec=fields.group_spec(None, None, size),
            lora_name=fields.adapter(event.lora_name, None, self._limits),
        )

    def _removed(
        self, event: GenericEvent, hashes: tuple[EngineHash, ...], tier: str | None, group: GroupIdx | None = None
    ) -> BlockRemoved:
        """``group``: what an event without one means; None is all groups."""
        told = fields.group(event.group)
        return BlockRemoved(hashes=hashes, tier=self._tier(tier), group=group if told is None else told)

    def _named(self, event: GenericEvent) -> EngineHash:
        """Return the block that an event is about: by its id, else the last block of its prefix."""
        if event.block_id is not None:
            return block_hash(event.block_id)
        if not event.prefix:
            raise EventFaultError("missing_field", f"block_id or prefix: {event.type.value} names no block")
        size = self._size(event, self._block_size_tokens)
        _check_whole(event, size)
        return self._hashes(event, size)[-1]

    def _hashes(self, event: GenericEvent, size: int) -> list[EngineHash]:
        """Derive hashes: 8 bytes or more for one of a token, so they are bounded over the whole payload."""
        count = len(event.prefix) // size
        if count > self._hashes_left:
            raise EventFaultError("oversize_event", f"prefix: {count} blocks, {self._hashes_left} left for this payload")
        self._hashes_left -= count
        return prefix_hashes(event.prefix, size, model=event.model, lora_name=event.lora_name)

    def _size(self, event: GenericEvent, default: int) -> int:
        size = event.block_size_tokens
        if size is not None and not 0 < size <= self._limits.block_size_tokens_max:
            raise EventFaultError("bad_block_size", f"block_size: {size}")
        return size or default

    def _tier(self, name: str | None) -> Tier:
        return fields.tier(name, self._limits)

    def _origin(self, pod_id: str | None, dp_rank: int | None, model: str | None) -> Origin:
        if dp_rank is not None and not 0 <= dp_rank <= _RANK_MAX:
            raise EventFaultError("bad_field", f"dp_rank: {dp_rank}")
        pod = fields.text(pod_id, "pod_id", self._limits)
        return Origin(
            PodId(pod) if pod else None,
            None if dp_rank is None else DpRank(dp_rank),
            fields.text(model, "model", self._limits) or None,
        )


def _check_whole(event: GenericEvent, size: int) -> None:
    if len(event.prefix) % size:
        raise EventFaultError("bad_prefix", f"prefix: {len(event.prefix)} tokens are no whole blocks of {size}")
