"""Payload bytes to the index: decode, apply, count. One call a frame; raises nothing that a payload can cause."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from kvatlas.errors import DecodeError
from kvatlas.index import Index
from kvatlas.index.protocol import PayloadIndex
from kvatlas.ingest.decode import Decoder
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.types import (
    AllBlocksCleared,
    ApplyReport,
    BlockRemoved,
    BlockStored,
    DecodeFault,
    EventBatch,
    Frame,
    Stream,
    Tier,
)

log = get_logger("kvatlas.ingest")

_REFUSED = "too many places (tier and group), or (keys.mode: engine) blocks of another size than keys.blockSize"


class Applied(msgspec.Struct):
    """What a run of frames did to a stream."""

    report: ApplyReport = msgspec.field(default_factory=ApplyReport)
    events: Counter[str] = msgspec.field(default_factory=Counter)
    """Events applied, by type."""
    faults: Counter[str] = msgspec.field(default_factory=Counter)
    """Events lost because they could not be read, by reason."""
    unknown_events: int = 0
    """Events of types that this version does not know: nothing is lost with them."""
    cleared: bool = False
    """The device cache was emptied after the last fault."""
    tiers: set[Tier] = msgspec.field(default_factory=set)
    """Tiers that blocks were stored to."""

    def add(self, later: Applied) -> None:
        """Add what later frames did."""
        self.report.add(later.report)
        self.events.update(later.events)
        self.faults.update(later.faults)
        self.unknown_events += later.unknown_events
        self.cleared = later.cleared or (self.cleared and not later.faults)
        self.tiers |= later.tiers


class Applier:
    """Applies frames of any stream. Safe to call from several threads for different streams."""

    def __init__(self, index: Index, metrics: Metrics, model_aliases: Mapping[str, str] | None = None) -> None:
        self._index = index
        self._native = index if isinstance(index, PayloadIndex) else None
        self._metrics = metrics
        self._model_aliases = model_aliases or {}

    def apply(self, stream: Stream, frames: Sequence[Frame], decoder: Decoder, model: str | None) -> Applied:
        """Decode and apply frames in order. What could not be read is counted, logged and reported."""
        applied = Applied()
        taken = 0
        while taken < len(frames):
            taken += self._apply_natively(stream, frames[taken:], decoder, model, applied)
            if taken < len(frames):
                self._apply_frame(stream, frames[taken], decoder, model, applied)
                taken += 1
        return applied

    def _apply_natively(
        self, stream: Stream, frames: Sequence[Frame], decoder: Decoder, model: str | None, applied: Applied
    ) -> int:
        """Let the index read frames by itself, if it can. Returns how many it took: up to one that it leaves to the decoder."""
        if self._native is None or decoder.wire is None:
            return 0
        payloads = [frame.payload for frame in frames]
        done = self._native.apply_payloads(stream, payloads, decoder.wire, self._named(model))
        for rank in done.ranks:
            target = Stream(stream.pod, rank.dp_rank)
            events = {
                BlockStored.__name__: rank.stored_events,
                BlockRemoved.__name__: rank.removed_events,
                AllBlocksCleared.__name__: rank.cleared_events,
            }
            self._note(target, Counter({kind: count for kind, count in events.items() if count}), rank.report, applied)
            if rank.timestamp_s is not None:
                self._metrics.lag(target.pod, max(0.0, time.time() - rank.timestamp_s))
            if target == stream:
                applied.tiers |= rank.tiers
                applied.cleared |= rank.cleared_events > 0
        return done.taken

    def _apply_frame(self, stream: Stream, frame: Frame, decoder: Decoder, model: str | None, applied: Applied) -> None:
        try:
            decoded = decoder.decode(frame.payload)
        except DecodeError as error:
            self._fault(stream, frame, DecodeFault(error.reason, error.detail), applied)
            return
        for batch in decoded.batches:
            self._apply_batch(stream, batch, model, applied)
        for fault in decoded.faults:
            self._fault(stream, frame, fault, applied)

    def _named(self, model: str | None) -> str | None:
        return self._model_aliases.get(model, model) if model else None

    def _apply_batch(self, stream: Stream, batch: EventBatch, model: str | None, applied: Applied) -> None:
        """Apply to the batch's own pod where it names one (our generic format), else to the stream's."""
        target = Stream(batch.pod or stream.pod, batch.dp_rank if batch.dp_rank is not None else stream.dp_rank)
        batch = msgspec.structs.replace(batch, model=self._named(batch.model or model))
        report = self._index.apply(target, batch)
        self._note(target, Counter(type(event).__name__ for event in batch.events), report, applied)
        if batch.timestamp_s is not None:
            self._metrics.lag(target.pod, max(0.0, time.time() - batch.timestamp_s))
        if target != stream:
            return
        for event in batch.events:
            if isinstance(event, BlockStored):
                applied.tiers.add(event.tier)
            elif isinstance(event, AllBlocksCleared):
                applied.cleared = True

    def _note(self, target: Stream, events: Counter[str], report: ApplyReport, applied: Applied) -> None:
        for kind, count in events.items():
            self._metrics.events(target.pod, kind, count)
        self._metrics.applied(target.pod, report)
        applied.events.update(events)
        applied.report.add(report)
        if report.refused:
            log.warning("blocks refused", stream=str(target), blocks=report.refused, reason=_REFUSED)
            applied.faults["refused"] += report.refused
            applied.cleared = False

    def _fault(self, stream: Stream, frame: Frame, fault: DecodeFault, applied: Applied) -> None:
        self._metrics.decode_fault(stream.pod, fault.reason)
        log.warning(
            "event not understood" if fault.harmless else "event lost",
            pod=stream.pod,
            dp_rank=stream.dp_rank,
            seq=frame.seq,
            reason=fault.reason,
            detail=fault.detail[:200],
        )
        if fault.harmless:
            applied.unknown_events += fault.reason == "unknown_event"
        else:
            applied.faults[fault.reason] += 1
            applied.cleared = False
