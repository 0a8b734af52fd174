"""Sequence numbers of one stream: what the next frame means. No IO: frames in, verdicts out.

An engine numbers its frames from 0 without holes, and starts again at 0 when it restarts. So a number too high is a gap, and
one too low is a repeated frame (same bytes) or a restarted engine (other bytes). A restarted engine may also have come further
than we had, which looks like a gap: so a replay is asked for from the last frame we know, and its bytes are compared first.
"""

from __future__ import annotations

import enum
from array import array

import xxhash

REMEMBERED_FRAMES = 1024
"""How many frames back a repeated one is known by its bytes: 16 KiB a stream."""


class Verdict(enum.Enum):
    """What a frame is to its stream."""

    NEXT = "next"
    DUPLICATE = "duplicate"
    GAP = "gap"
    RESTART = "restart"
    OLD = "old"
    """Too low, and too old to be remembered: a repeated frame or a restart, and the numbers can't tell."""


class SequenceTracker:
    """Follows one stream's numbers. ``next_seq`` None: nothing has been seen, so frame 0 must come first."""

    def __init__(self, remembered_frames: int = REMEMBERED_FRAMES) -> None:
        self.next_seq: int | None = None
        self._digests = array("Q", bytes(8 * remembered_frames))
        self._numbers = array("Q", bytes(8 * remembered_frames))
        """Whose digest each is: the frame's number + 1, or 0."""

    def judge(self, seq: int, payload: bytes) -> Verdict:
        """Say what a frame is. Changes nothing."""
        expected = self.next_seq or 0
        if seq == expected:
            return Verdict.NEXT
        if seq > expected:
            return Verdict.GAP
        remembered = self.remembers(seq, payload)
        if remembered is None:
            return Verdict.OLD
        return Verdict.DUPLICATE if remembered else Verdict.RESTART

    def accept(self, seq: int, payload: bytes) -> None:
        """Note a frame as seen; the next one is ``seq + 1``. One with a higher number than expected skips those between."""
        slot = seq % len(self._digests)
        self._digests[slot] = xxhash.xxh3_64_intdigest(payload)
        self._numbers[slot] = seq + 1
        self.next_seq = seq + 1

    def remembers(self, seq: int, payload: bytes) -> bool | None:
        """Tell whether frame ``seq`` had these bytes; None if it is not remembered."""
        slot = seq % len(self._digests)
        if self._numbers[slot] != seq + 1:
            return None
        return self._digests[slot] == xxhash.xxh3_64_intdigest(payload)

    def replay_from(self) -> int:
        """Return where a replay has to start: at the last frame seen, to check that the engine is still the same."""
        return max(0, (self.next_seq or 0) - 1)

    def reset(self, next_seq: int | None = None) -> None:
        """Forget all frames; ``next_seq`` is expected now."""
        self.next_seq = next_seq
        self._numbers = array("Q", bytes(8 * len(self._numbers)))
