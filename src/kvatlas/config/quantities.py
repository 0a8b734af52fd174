"""Durations and sizes as people write them: "250ms", "1h", "2GiB"."""

from __future__ import annotations

import math
import re
from typing import NewType

Seconds = NewType("Seconds", float)
"""A duration in seconds."""

Bytes = NewType("Bytes", int)
"""A size in bytes."""

DURATION_FORMS = 'a duration such as "250ms", "90s", "5m", "1h", "1h30m", or a number of seconds'
SIZE_FORMS = 'a size such as "512KiB", "64MiB", "2GiB", or a number of bytes'

_SECONDS_BY_UNIT = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_BYTES_BY_UNIT = {
    "TiB": 1 << 40,
    "GiB": 1 << 30,
    "MiB": 1 << 20,
    "KiB": 1 << 10,
    "TB": 10**12,
    "GB": 10**9,
    "MB": 10**6,
    "kB": 10**3,
    "B": 1,
}

_NUMBER = r"[0-9]{1,18}(?:\.[0-9]{1,9})?"
_DURATION_PART = re.compile(rf"({_NUMBER})(ms|us|d|h|m|s)", re.ASCII)
_DURATION = re.compile(rf"(?:{_NUMBER}(?:ms|us|d|h|m|s))+", re.ASCII)
_SIZE = re.compile(rf"({_NUMBER}) ?([KMGT]iB|[kMGT]B|B)", re.ASCII)
_PLAIN = re.compile(_NUMBER, re.ASCII)


def parse_duration(value: object) -> Seconds:
    """Return a duration in seconds. Raises ValueError for anything that is no duration (see ``DURATION_FORMS``)."""
    number = _plain_number(value)
    if number is not None:
        return Seconds(float(number))
    if isinstance(value, str) and _DURATION.fullmatch(value.strip()):
        parts = _DURATION_PART.findall(value)
        return Seconds(math.fsum(float(count) * _SECONDS_BY_UNIT[unit] for count, unit in parts))
    raise ValueError(f"{value!r:.60} is no duration")


def parse_size(value: object) -> Bytes:
    """Return a size in bytes. Raises ValueError for anything that is no whole number of bytes (see ``SIZE_FORMS``)."""
    number = _plain_number(value)
    if number is None and isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        number = float(match[1]) * _BYTES_BY_UNIT[match[2]] if "." in match[1] else int(match[1]) * _BYTES_BY_UNIT[match[2]]
    if number is None or number != int(number):
        raise ValueError(f"{value!r:.60} is no size")
    return Bytes(int(number))


def format_duration(seconds: float) -> str:
    """Return the shortest form that reads back as the same duration: 3600.0 is "1h", 0.25 is "250ms"."""
    if seconds == 0:
        return "0s"
    for unit in ("h", "m", "s", "ms"):
        count = seconds / _SECONDS_BY_UNIT[unit]
        if count >= 1 and math.isclose(count, round(count), rel_tol=1e-12):
            return f"{round(count)}{unit}"
    return f"{seconds:g}s"


def round_duration(seconds: float) -> str:
    """Return a time with three digits at most, for people: 430 us, 4.3 ms, 120 ms, 1.23 s, 31.1 s."""
    if seconds >= 10:
        return f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 0.01:
        return f"{seconds * 1e3:.0f} ms"
    if seconds >= 0.001:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} us" if seconds else "0"


def format_size(size_bytes: int) -> str:
    """Return the shortest exact form in binary units: 2147483648 is "2GiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _BYTES_BY_UNIT[unit] == 0:
            return f"{size_bytes // _BYTES_BY_UNIT[unit]}{unit}"
    return f"{size_bytes}B"


def _plain_number(value: object) -> float | int | None:
    """Return a finite, non-negative number written as a number or as its digits; None for everything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and _PLAIN.fullmatch(value.strip()):
        value = float(value) if "." in value else int(value)
    if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
        return value
    return None
