"""What a sequence number means."""

from __future__ import annotations

from kvatlas.ingest.sequence import REMEMBERED_FRAMES, SequenceTracker, Verdict


def payload(seq: int, process: str = "one") -> bytes:
    return f"{process} {seq}".encode()


def tracker_after(count: int, start: int = 0) -> SequenceTracker:
    tracker = SequenceTracker()
    tracker.reset(start)
    for seq in range(start, start + count):
        tracker.accept(seq, payload(seq))
    return tracker


def test_a_stream_begins_with_frame_0() -> None:
    tracker = SequenceTracker()
    assert tracker.judge(0, b"") is Verdict.NEXT
    assert tracker.judge(3, b"") is Verdict.GAP
    assert tracker.replay_from() == 0


def test_a_number_too_high_is_a_gap() -> None:
    tracker = tracker_after(5)
    assert tracker.judge(5, payload(5)) is Verdict.NEXT
    assert tracker.judge(6, payload(6)) is Verdict.GAP
    assert tracker.replay_from() == 4


def test_a_number_too_low_is_a_repetition_with_the_same_bytes_and_a_restart_with_others() -> None:
    tracker = tracker_after(5)
    assert tracker.judge(2, payload(2)) is Verdict.DUPLICATE
    assert tracker.judge(2, payload(2, "two")) is Verdict.RESTART
    assert tracker.judge(0, payload(0, "two")) is Verdict.RESTART


def test_a_frame_too_old_to_be_remembered_is_said_to_be_just_that() -> None:
    """Neither its number nor the engine's clock can tell a repetition from a restart."""
    tracker = tracker_after(2 * REMEMBERED_FRAMES)
    assert tracker.remembers(5, payload(5)) is None
    assert tracker.judge(5, payload(5)) is Verdict.OLD
    assert tracker.judge(REMEMBERED_FRAMES, payload(REMEMBERED_FRAMES)) is Verdict.DUPLICATE


def test_only_frames_that_were_seen_are_remembered() -> None:
    tracker = tracker_after(3, start=100)
    assert tracker.remembers(100, payload(100)) is True
    assert tracker.remembers(99, payload(99)) is None
    assert tracker.remembers(103, payload(103)) is None


def test_a_reset_forgets() -> None:
    tracker = tracker_after(5)
    tracker.reset()
    assert tracker.next_seq is None
    assert tracker.remembers(2, payload(2)) is None
    assert tracker.judge(0, payload(0)) is Verdict.NEXT
