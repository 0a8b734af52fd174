"""One stream's frames as live ingest would take them without a replay endpoint. No IO."""

from __future__ import annotations

from kvatlas.index import Index
from kvatlas.ingest.apply import Applied, Applier
from kvatlas.ingest.decode import Decoder
from kvatlas.ingest.sequence import SequenceTracker, Verdict
from kvatlas.ingest.trust import StreamTrust
from kvatlas.observe.metrics import Metrics
from kvatlas.types import Frame, StaleReason, Stream

REMEMBERED_FRAMES = 65_536
"""More than live: a capture and the replay of the same engine may be given together."""


class StreamFollower:
    """Takes a stream's frames in order, and marks it in the index when events are missing."""

    def __init__(self, stream: Stream, index: Index, applier: Applier, metrics: Metrics) -> None:
        self.duplicates = 0
        self.gaps = 0
        self.frames_missed = 0
        """In gaps, and before the first frame."""
        self._stream = stream
        self._applier = applier
        self._tracker = SequenceTracker(REMEMBERED_FRAMES)
        self._trust = StreamTrust(stream, self._tracker, index, metrics, "capture", drop_when_stale=False)
        self._trust.show()

    @property
    def restarts(self) -> int:
        return self._trust.restarts

    def take(self, frame: Frame, decoder: Decoder, model: str | None) -> Applied:
        """Apply a frame, unless it is a repeated one."""
        if frame.seq is not None and not self._admit(frame.seq, frame.payload):
            return Applied()
        applied = self._applier.apply(self._stream, [frame], decoder, model)
        self._trust.learn(applied)
        return applied

    def _admit(self, seq: int, payload: bytes) -> bool:
        verdict = self._tracker.judge(seq, payload)
        if verdict in (Verdict.RESTART, Verdict.OLD):
            self._trust.engine_restarted()
            verdict = self._tracker.judge(seq, payload)
        if verdict is Verdict.DUPLICATE:
            self.duplicates += 1
            return False
        if verdict is Verdict.GAP:
            first_contact = self._tracker.next_seq is None
            self.frames_missed += seq - (self._tracker.next_seq or 0)
            self.gaps += not first_contact
            self._trust.spoil(StaleReason.HISTORY_INCOMPLETE if first_contact else StaleReason.GAP)
        self._tracker.accept(seq, payload)
        return True
