"""Lines of trace files: JSON objects, one a line, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from kvatlas.errors import RequestError

LINE_BYTES_MAX = 64 * 1024 * 1024

T = TypeVar("T", bound=msgspec.Struct)


class TraceLines(Generic[T]):
    """A trace's records with where they stand, read as they are asked for. RequestError for what is none."""

    def __init__(self, file: Path, record: type[T], example: str) -> None:
        self.file = file
        self._example = example
        self._decoder = msgspec.json.Decoder(record)

    def __iter__(self) -> Iterator[tuple[str, T]]:
        for number, _, line in numbered(self.file):
            yield self.where(number), self.read(line, number)

    def where(self, number: int) -> str:
        return f"{self.file} line {number}"

    def read(self, line: bytes, number: int) -> T:
        try:
            return self._decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(
                self.where(number), f"is no record of this trace: {error}", f"it looks like {self._example}"
            ) from None


def numbered(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield lines that are not blank: number, byte offset once unpacked, bytes. RequestError where they can't be read."""
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            offset_bytes = 0
            number = 0
            while line := lines.readline(LINE_BYTES_MAX):
                number += 1
                if len(line) == LINE_BYTES_MAX:
                    raise RequestError(f"{file} line {number}", "is longer than 64 MiB", "give one JSON object a line")
                if line.strip():
                    yield number, offset_bytes, line
                offset_bytes += len(line)
    except (OSError, EOFError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or error
        remedy = "name a trace: one JSON object a line, plain or .gz"
        raise RequestError(str(file), f"cannot be read: {problem}", remedy) from None
