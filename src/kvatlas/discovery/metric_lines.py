"""Single metrics out of a page in the Prometheus text format, without parsing the rest of it. No IO.

A page of an engine has hundreds of lines and half a dozen of them matter here, twenty times a second: names are looked for as
bytes, and only lines that carry them are taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_NAME_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_:")
_REST = re.compile(
    rb'(?:[ \t]*+\{((?:[^"\n}]++|"(?:[^"\\\n]++|\\.)*+")*+)\}[ \t]*+|[ \t]++)'  # labels
    rb"([^\s_]++)(?:[ \t]++[-+0-9]++)?+[ \t\r]*+(?:\n|\Z)"  # value, timestamp
)
_LABEL = re.compile(rb'[ \t]*+([a-zA-Z_][a-zA-Z0-9_]*+)[ \t]*+=[ \t]*+"((?:[^"\\]++|\\.)*+)"[ \t]*+(?:,|\Z)')
_ESCAPE = re.compile(rb'\\([\\n"])')


class Sample(NamedTuple):
    """One line: a series and its value."""

    written_labels: bytes
    value: float

    @property
    def labels(self) -> dict[str, str]:
        """Its labels. Raises MalformedLineError; they are taken apart only when they are asked for."""
        return _labels(self.written_labels)


class MalformedLineError(ValueError):
    """A line has the metric's name and is none of the format."""


def samples(page: bytes, name: bytes) -> Iterator[Sample]:
    """Yield the samples of one metric. Raises MalformedLineError.

    Source: Prometheus' text exposition format 0.0.4; a timestamp is read over, as are other metrics that begin with the name.
    """
    at = page.find(name)
    while at >= 0:
        end = at + len(name)
        line = page.rfind(b"\n", 0, at) + 1
        if not page[line:at].strip(b" \t") and page[end : end + 1] and page[end] not in _NAME_BYTES:
            rest = _REST.match(page, end)
            if rest is None:
                raise MalformedLineError(f"{page[line : line + 80]!r}")
            yield Sample(rest[1] or b"", _value(rest[2]))
            end = rest.end()
        at = page.find(name, end)


def _value(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        raise MalformedLineError(f"{text[:40]!r} is no number") from None


def _labels(text: bytes) -> dict[str, str]:
    labels = {}
    at = 0
    end = len(text.rstrip(b" \t"))
    while at < end:
        label = _LABEL.match(text, at)
        if label is None:
            raise MalformedLineError(f"{text[at : at + 40]!r} is no label")
        value = label[2]
        if b"\\" in value:
            value = _ESCAPE.sub(lambda found: b"\n" if found[1] == b"n" else found[1], value)
        try:
            labels[label[1].decode()] = value.decode()
        except UnicodeDecodeError:
            raise MalformedLineError(f"{value[:40]!r} is not UTF-8") from None
        at = label.end()
    return labels
