"""Payload bytes to the index: decode, apply, count. One call a frame; raises nothing that a payload can cause."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from kvatlas.errors import DecodeError
from kvatlas.index import Index
from kvatlas.ingest.decode import Decoder
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.types import (
    AllBlocksCleared,
    BlockStored,
    DecodeFault,
    EventBatch,
    Frame,
    Stream,
    Tier,
)

log = get_logger("kvatlas.ingest")


class Applied(msgspec.Struct):
    """What a run of frames did to a stream."""

    faults: int = 0
    """Events lost because they could not be read."""
    cleared: bool = False
    """The device cache was emptied after the last fault."""
    tiers: set[Tier] = msgspec.field(default_factory=set)
    """Tiers that blocks were stored to."""


class Applier:
    """Applies frames of any stream. Safe to call from several threads for different streams."""

    def __init__(self, index: Index, metrics: Metrics, model_aliases: Mapping[str, str] | None = None) -> None:
        self._index = index
        self._metrics = metrics
        self._model_aliases = model_aliases or {}

    def apply(self, stream: Stream, frames: Sequence[Frame], decoder: Decoder, model: str | None) -> Applied:
        """Decode and apply frames in order. What could not be read is counted, logged and reported."""
        applied = Applied()
        for frame in frames:
            try:
                decoded = decoder.decode(frame.payload)
            except DecodeError as error:
                self._fault(stream, frame, DecodeFault(error.reason, error.detail), applied)
                continue
            for batch in decoded.batches:
                self._apply_batch(stream, batch, model, applied)
            for fault in decoded.faults:
                self._fault(stream, frame, fault, applied)
        return applied

    def _apply_batch(self, stream: Stream, batch: EventBatch, model: str | None, applied: Applied) -> None:
        """Apply to the batch's own pod where it names one (our generic format), else to the stream's."""
        target = Stream(batch.pod or stream.pod, batch.dp_rank if batch.dp_rank is not None else stream.dp_rank)
        named = batch.model or model
        batch = msgspec.structs.replace(batch, model=self._model_aliases.get(named, named) if named else None)
        report = self._index.apply(target, batch)
        for kind, count in Counter(type(event).__name__ for event in batch.events).items():
            self._metrics.events(target.pod, kind, count)
        self._metrics.applied(target.pod, report)
        if batch.timestamp_s is not None:
            self._metrics.lag(target.pod, max(0.0, time.time() - batch.timestamp_s))
        if target != stream:
            return
        for event in batch.events:
            if isinstance(event, BlockStored):
                applied.tiers.add(event.tier)
            elif isinstance(event, AllBlocksCleared):
                applied.cleared = True

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
        if not fault.harmless:
            applied.faults += 1
            applied.cleared = False
