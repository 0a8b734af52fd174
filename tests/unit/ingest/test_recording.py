"""Captures: what was written is read back, and no damage is taken for data or costs memory."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest

from kvatlas.errors import RecordingError
from kvatlas.ingest.recording import FRAME_BYTES_MAX, FRAMES_MAX, RecordingWriter, read_frames, read_recording
from kvatlas.types import Frame

SEQ_7 = (7).to_bytes(8, "big")
MARKER = b"\xff" * 8


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "capture.bin"


def write(path: Path, *records: list[bytes]) -> bytes:
    with RecordingWriter(path) as writer:
        for i, frames in enumerate(records):
            writer.append(frames, received_ns=100 + i)
    return path.read_bytes()


def test_what_was_appended_is_read_back(path: Path) -> None:
    records = [[b"t", SEQ_7, b"payload"], [], [b"", b""]]
    write(path, *records)
    assert list(read_recording(path)) == [(100 + i, frames) for i, frames in enumerate(records)]


def test_the_bytes_are_those_of_the_captures_of_a_real_engine(path: Path) -> None:
    assert write(path, [b"t", b""]) == struct.pack(">QIIcI", 100, 2, 1, b"t", 0)


def test_a_capture_can_be_continued(path: Path) -> None:
    write(path, [b"a"])
    with RecordingWriter(path, append=True) as writer:
        writer.append([b"b"])
        assert writer.records == 1
    assert [frames for _, frames in read_recording(path)] == [[b"a"], [b"b"]]
    write(path, [b"c"])
    assert [frames for _, frames in read_recording(path)] == [[b"c"]]


def test_flushed_records_are_there_before_the_writer_closes(path: Path) -> None:
    with RecordingWriter(path) as writer:
        writer.append([b"a"])
        writer.flush()
        assert [frames for _, frames in read_recording(path)] == [[b"a"]]


def test_frames_of_a_live_stream_and_of_all_replays_are_read(path: Path) -> None:
    write(path, [b"kv@a", SEQ_7, b"1"], [b"", b"kv@a", SEQ_7, b"2"], [b"", SEQ_7, b"3"])
    assert list(read_frames(path)) == [
        Frame("kv@a", 7, b"1", 100),
        Frame("kv@a", 7, b"2", 101),
        Frame("", 7, b"3", 102),
    ]


@pytest.mark.parametrize("marker", [[b"", b"", MARKER, b""], [b"", MARKER, b""]])
def test_a_replay_ends_at_its_marker(path: Path, marker: list[bytes]) -> None:
    write(path, [b"", b"t", SEQ_7, b"1"], marker, [b"no frame"])
    assert [frame.payload for frame in read_frames(path)] == [b"1"]


def test_a_frame_written_is_the_frame_read(path: Path) -> None:
    frame = Frame("kv@a", 3, b"x", 55)
    with RecordingWriter(path) as writer:
        writer.append_frame(frame)
        with pytest.raises(ValueError, match="sequence"):
            writer.append_frame(Frame("kv@a", None, b"x", 55))
    assert list(read_frames(path)) == [frame]


@pytest.mark.parametrize(
    "frames", [[b"t", SEQ_7], [b"t", SEQ_7[1:], b"p"], [b"x", b"t", SEQ_7, b"p"], [b"", b"", b"t", SEQ_7, b"p"]]
)
def test_a_record_that_is_no_event_frame_is_refused_with_its_place(path: Path, frames: list[bytes]) -> None:
    first = write(path, [b"t", SEQ_7, b"1"])
    write(path, [b"t", SEQ_7, b"1"], frames)
    reader = read_frames(path)
    assert next(reader).payload == b"1"
    with pytest.raises(RecordingError) as caught:
        next(reader)
    assert caught.value.offset_bytes == len(first)


def test_a_cut_off_record_is_an_error_that_counts_the_good_ones(path: Path) -> None:
    good = write(path, [b"a"], [b"b"])
    whole = write(path, [b"a"], [b"b"], [b"ccc", b"d"])
    for end in range(len(good) + 1, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(RecordingError, match="after 2 good") as caught:
            list(read_recording(path))
        assert caught.value.offset_bytes == len(good)
        assert [frames for _, frames in read_recording(path, tolerate_truncation=True)] == [[b"a"], [b"b"]]


@pytest.mark.parametrize(
    ("damage", "offset"),
    [
        (struct.pack(">QI", 1, FRAMES_MAX + 1), 8),
        (struct.pack(">QI", 1, 0xFFFF_FFFF), 8),
        (struct.pack(">QII", 1, 1, FRAME_BYTES_MAX + 1), 12),
        (struct.pack(">QII", 1, 1, 0xFFFF_FFFF), 12),
    ],
)
def test_impossible_sizes_are_damage_even_where_a_cut_is_tolerated(path: Path, damage: bytes, offset: int) -> None:
    path.write_bytes(damage)
    with pytest.raises(RecordingError) as caught:
        list(read_recording(path, tolerate_truncation=True))
    assert caught.value.offset_bytes == offset


def test_a_promised_length_costs_no_memory(path: Path) -> None:
    path.write_bytes(struct.pack(">QII", 1, 1, FRAME_BYTES_MAX))
    tracemalloc.start()
    try:
        with pytest.raises(RecordingError):
            list(read_recording(path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_empty_file_is_an_empty_capture(path: Path) -> None:
    path.touch()
    assert list(read_frames(path)) == []


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="cannot be read"):
        list(read_recording(tmp_path / "none"))
    with pytest.raises(RecordingError, match="cannot be read"):
        list(read_recording(tmp_path))
    with pytest.raises(RecordingError, match="cannot be written"):
        RecordingWriter(tmp_path)


def test_what_could_not_be_read_back_is_not_written(path: Path) -> None:
    with RecordingWriter(path) as writer:
        for frames in ([b""] * (FRAMES_MAX + 1), [bytes(FRAME_BYTES_MAX + 1)]):
            with pytest.raises(RecordingError, match="too large"):
                writer.append(frames)
    assert path.read_bytes() == b""
