"""Captures of event streams: what an engine sent, byte for byte and with times.

A file is records without header or padding: u64 receive time (unix ns), u32 number of frames, then for each frame u32 length
and its bytes; all big endian. So a capture can be appended to, and a writer that was killed damages its last record at most.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from kvatlas.errors import RecordingError
from kvatlas.types import Frame

_HEAD = struct.Struct(">QI")
_LENGTH = struct.Struct(">I")
_SEQ = struct.Struct(">Q")

FRAMES_MAX = 16
"""Frames in a record. An engine sends 3 or 4; more means that the file is no capture."""
FRAME_BYTES_MAX = 64 << 20
"""Bytes in a frame: the largest payload that a decoder takes by default."""
END_SEQ = (1 << 64) - 1
"""The sequence number that ends a replay."""


class _TruncatedError(Exception):
    """The file ends inside a record."""


def read_recording(path: str | os.PathLike[str], *, tolerate_truncation: bool = False) -> Iterator[tuple[int, list[bytes]]]:
    """Yield each record: receive time in unix ns, and the message's frames.

    Reads one record at a time and nothing by a length that was not compared with what the file has left. Raises
    RecordingError for a file that cannot be opened, for damage, and for a last record that is cut off;
    ``tolerate_truncation`` ends before that one instead.
    """
    for _, received_ns, frames in _records(Path(path), tolerate_truncation):
        yield received_ns, frames


def read_frames(path: str | os.PathLike[str], *, tolerate_truncation: bool = False) -> Iterator[Frame]:
    """Yield each record as a Frame, up to a replay's end marker if there is one.

    Live records are ``[topic, seq, payload]``; replies to a replay request are ``[b"", topic, seq, payload]``, or of older
    vLLM and of SGLang ``[b"", seq, payload]``. Raises RecordingError as :func:`read_recording`, and for any other shape.
    """
    for offset, received_ns, frames in _records(Path(path), tolerate_truncation):
        parts = frames[1:] if len(frames) == 4 and not frames[0] else frames
        if len(parts) != 3 or len(parts[1]) != _SEQ.size:
            shape = [len(frame) for frame in frames]
            raise RecordingError(str(path), offset, f"frames of {shape} bytes are no [topic, 8-byte seq, payload]")
        topic, seq, payload = parts
        number = int(_SEQ.unpack(seq)[0])
        if number == END_SEQ:
            return
        yield Frame(topic.decode("utf-8", "replace"), number, payload, received_ns)


def _records(path: Path, tolerate_truncation: bool) -> Iterator[tuple[int, int, list[bytes]]]:
    """Yield (offset in the file, receive time, frames)."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise RecordingError(str(path), 0, f"cannot be read: {error.strerror}") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        good = offset = 0
        while offset < size:
            try:
                received_ns, frames = _read_record(file, size, str(path))
            except _TruncatedError as error:
                if tolerate_truncation:
                    return
                problem = f"the file ends inside a record, after {good} good ones"
                remedy = "`kvatlas replay --allow-truncated` takes those before"
                raise RecordingError(str(path), offset, problem, remedy) from error
            yield offset, received_ns, frames
            good += 1
            offset = file.tell()


def _read_record(file: BinaryIO, size: int, path: str) -> tuple[int, list[bytes]]:
    received_ns, count = _HEAD.unpack(_read(file, _HEAD.size, size))
    if count > FRAMES_MAX:
        raise RecordingError(path, file.tell() - 4, f"a record of {count} frames; at most {FRAMES_MAX} make sense")
    frames = []
    for _ in range(count):
        (length,) = _LENGTH.unpack(_read(file, _LENGTH.size, size))
        if length > FRAME_BYTES_MAX:
            raise RecordingError(path, file.tell() - 4, f"a frame of {length} bytes; at most {FRAME_BYTES_MAX} make sense")
        frames.append(_read(file, length, size))
    return received_ns, frames


def _read(file: BinaryIO, length: int, size: int) -> bytes:
    if length > size - file.tell():
        raise _TruncatedError
    taken = file.read(length)
    if len(taken) < length:  # the file has shrunk since it was opened
        raise _TruncatedError
    return taken


class RecordingWriter:
    """Writes a capture, as a context manager. A record is written with one call, so only the last one can be cut off.

    ``append``: go on with an existing file; else a file at ``path`` is replaced.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        self._path = Path(path)
        self.records = 0
        """Written by this writer."""
        try:
            self._file = self._path.open("ab" if append else "wb")
        except OSError as error:
            raise RecordingError(str(path), 0, f"cannot be written: {error.strerror}") from error

    def append(self, frames: Sequence[bytes], received_ns: int | None = None) -> None:
        """Add a message: its frames and its receive time (default: now). RecordingError for what could not be read back."""
        if len(frames) > FRAMES_MAX or any(len(frame) > FRAME_BYTES_MAX for frame in frames):
            problem = f"a message of {len(frames)} frames, the longest of {max(map(len, frames))} bytes, is too large"
            raise RecordingError(str(self._path), self._file.tell(), problem)
        parts = [_HEAD.pack(time.time_ns() if received_ns is None else received_ns, len(frames))]
        for frame in frames:
            parts += (_LENGTH.pack(len(frame)), frame)
        self._file.write(b"".join(parts))
        self.records += 1

    def append_frame(self, frame: Frame) -> None:
        """Add a frame as a live message. A frame without sequence number cannot be kept: ValueError."""
        if frame.seq is None:
            raise ValueError("a capture keeps sequence numbers; this frame has none")
        self.append([frame.topic.encode(), _SEQ.pack(frame.seq), frame.payload], frame.received_ns)

    def flush(self) -> None:
        """Hand what was appended to the operating system."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
