"""msgpack read with suspicion: sizes are looked at before anything is built.

msgspec never allocates by a declared length and stops at Python's recursion limit, but a small payload may still declare
(and hold) far more objects than an engine would send. So arrays are kept raw until their header was checked.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what was asked for. (ValidationError is a DecodeError; bad UTF-8 is not.)"""

NIL = msgspec.Raw(b"\xc0")

_ANY = msgspec.msgpack.Decoder(msgspec.Raw)


class NotMsgpackError(Exception):
    """Bytes that are no msgpack value, or one nested too deeply."""


def skim(payload: bytes) -> None:
    """Walk a whole value and build nothing. Raises NotMsgpackError.

    What follows may then rely on it: every declared length is really there, and no level is beyond the recursion limit.
    """
    try:
        _ANY.decode(payload)
    except UNREADABLE as error:
        raise NotMsgpackError(explain(error)) from error


def explain(error: BaseException) -> str:
    """Return one line that says what was wrong, for people."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def is_nil(raw: msgspec.Raw) -> bool:
    return memoryview(raw)[0] == 0xC0


def is_map(raw: msgspec.Raw) -> bool:
    first = memoryview(raw)[0]
    return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)


def array_length(raw: msgspec.Raw | bytes) -> int | None:
    """Return how many elements an array has by its header, or None for any other value."""
    view = memoryview(raw)
    first = view[0]
    if 0x90 <= first <= 0x9F:
        return first & 0x0F
    if first == 0xDC:
        return int.from_bytes(view[1:3], "big")
    if first == 0xDD:
        return int.from_bytes(view[1:5], "big")
    return None
