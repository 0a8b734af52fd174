"""One stream's frames as live ingest would take them without a replay endpoint. No IO."""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas.index import Index
from kvatlas.ingest.decode.header import peek_header
from kvatlas.ingest.sequence import SequenceTracker, Verdict
from kvatlas.types import GPU, AllBlocksCleared, BlockStored, Event, Frame, StaleReason, Stream, Tier


class StreamFollower:
    """Judges a stream's frames, and marks it in the index when events are missing."""

    def __init__(self, stream: Stream, index: Index) -> None:
        self.duplicates = 0
        self.gaps = 0
        self.frames_missed = 0
        """In gaps, and before the first frame."""
        self.restarts = 0
        self._stream = stream
        self._index = index
        self._tracker = SequenceTracker(lambda payload: peek_header(payload).timestamp_s)
        self._flaw: StaleReason | None = None
        self._tiers: set[Tier] = set()
        index.mark(stream, None)

    def admit(self, frame: Frame) -> bool:
        """Tell whether a frame is to be applied; it is not when it is a repeated one."""
        if frame.seq is None:
            return True
        verdict = self._tracker.judge(frame.seq, frame.payload)
        if verdict is Verdict.RESTART:
            self.restarts += 1
            self._index.drop(self._stream)
            self._tracker.reset(0)
            self._tiers.clear()
            self._set_flaw(None)
            verdict = self._tracker.judge(frame.seq, frame.payload)
        if verdict is Verdict.GAP:
            self._missed(frame.seq)
        elif verdict is Verdict.DUPLICATE:
            self.duplicates += 1
            return False
        self._tracker.accept(frame.seq, frame.payload)
        return True

    def learn(self, events: Sequence[Event], events_lost: int) -> None:
        """Take account of what a frame said. An emptied device is known again, unless lower tiers hold blocks too."""
        for event in events:
            if isinstance(event, BlockStored):
                self._tiers.add(event.tier)
            elif isinstance(event, AllBlocksCleared) and self._tiers <= {GPU}:
                self._set_flaw(None)
        if events_lost:
            self._set_flaw(StaleReason.DECODE_ERROR)

    def _missed(self, seq: int) -> None:
        expected = self._tracker.next_seq
        self.frames_missed += seq - (expected or 0)
        if expected is None:
            self._set_flaw(StaleReason.HISTORY_INCOMPLETE)
        else:
            self.gaps += 1
            self._set_flaw(StaleReason.GAP)

    def _set_flaw(self, reason: StaleReason | None) -> None:
        if reason is not self._flaw:
            self._flaw = reason
            self._index.mark(self._stream, reason)
