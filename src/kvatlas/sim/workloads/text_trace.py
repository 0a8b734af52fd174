"""Traces with texts: what was asked and answered, when, in which session.

Source of the format: LMCache/lmcache-agent-trace.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import xxhash
from msgspec import Meta

from kvatlas.errors import RequestError
from kvatlas.sim.workloads.trace_lines import TraceLines, numbered
from kvatlas.sim.workloads.workload import Arrival

EXAMPLE = '{"timestamp": 1760587752017385, "input": "...", "output": "...", "session_id": "..."}'
_PIECES = re.compile(rb"\s?[^\s]{1,4}|\s")


class TextParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which trace, and what makes tokens of it."""

    file: Annotated[str, Meta(min_length=1, description="the trace: JSON lines, plain; .gz where it is sorted by time")]
    tokenizer: Annotated[str, Meta(description="tokenizer.json, or its directory; empty: pieces of at most 4 bytes")] = ""


class _Record(msgspec.Struct):
    """The fields that matter here; records may have more."""

    timestamp: Annotated[float, Meta(ge=0)]
    """Microseconds."""
    input: str
    output: str = ""
    session_id: str | None = None


class _Time(msgspec.Struct):
    timestamp: Annotated[float, Meta(ge=0)]


class TextTrace:
    """The trace's requests at the trace's times, the first at 0.

    The file is read twice: for the order of time, of which 16 bytes a request are kept, and for texts, as they are asked for.
    """

    def __init__(self, parameters: TextParameters, seed: int, scale: float) -> None:
        self._file = Path(parameters.file)
        self.name = self._file.name
        self._lines = TraceLines(self._file, _Record, EXAMPLE)
        self._tokens = _tokenizer(parameters.tokenizer) if parameters.tokenizer else pieces
        self._scale = scale

    def arrivals(self) -> Iterator[Arrival]:
        first_us = None
        for number, line in self._in_order():
            record = self._lines.read(line, number)
            if first_us is None:
                first_us = record.timestamp
            prompt = self._tokens(record.input) or array("I", (0,))
            answer = self._tokens(record.output) or array("I", (0,))
            session = None if record.session_id is None else _number(record.session_id)
            at_s = (record.timestamp - first_us) / 1e6 / self._scale
            yield Arrival(at_s, prompt + answer, len(prompt), session=session)

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        return None

    def _in_order(self) -> Iterator[tuple[int, bytes]]:
        """Yield numbers and lines in the order of time. Lines of one time stay in the order of the file."""
        times = TraceLines(self._file, _Time, EXAMPLE)
        stamps, offsets, numbers = array("d"), array("Q"), array("Q")
        for number, offset_bytes, line in numbered(self._file):
            stamps.append(times.read(line, number).timestamp)
            offsets.append(offset_bytes)
            numbers.append(number)
        order = sorted(range(len(stamps)), key=stamps.__getitem__)
        if order == list(range(len(stamps))):
            yield from ((number, line) for number, _, line in numbered(self._file))
            return
        if self._file.suffix == ".gz":
            raise RequestError(str(self._file), "timestamp: is not in order", "unpack the file, or sort its lines by timestamp")
        with self._file.open("rb") as lines:
            for place in order:
                lines.seek(offsets[place])
                yield numbers[place], lines.readline()


def pieces(text: str) -> array[int]:
    """Return the stand-in's tokens: words, with the blank before them, in pieces of 4 bytes at most.

    That is about as long as a real token of English. Pieces begin anew with each word, so that a text's tokens are
    those of its beginning, whatever goes on behind a word's end.
    """
    return array("I", map(zlib.crc32, _PIECES.findall(text.encode("utf-8", "replace"))))


def _number(session_id: str) -> int:
    return xxhash.xxh3_64_intdigest(session_id.encode("utf-8", "replace")) >> 1


def _tokenizer(named: str) -> Callable[[str], array[int]]:
    """Return a real tokenizer, without special tokens: the trace's texts have none. RequestError where there is none."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise RequestError("tokenizer", "needs a package", "pip install 'kvatlas[tokens]', or leave it out") from None
    path = Path(named)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        loaded = Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # tokenizers raises Exception itself
        raise RequestError("tokenizer", f"{file} cannot be read: {error}", "name a tokenizer.json or its directory") from None
    return lambda text: array("I", loaded.encode(text, add_special_tokens=False).ids)
