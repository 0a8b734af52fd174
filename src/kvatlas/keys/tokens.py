"""Token input in any shape a caller has it, as one array of 32-bit ids."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, TypeAlias

from typing_extensions import Buffer

from kvatlas.errors import TokensError

TokenIds: TypeAlias = Sequence[int] | Buffer
"""A list or tuple of ints, or anything one-dimensional with the buffer protocol: array('I'), a numpy integer array."""

TOKEN_ID_MAX = 0xFFFF_FFFF

_INTEGER_FORMATS = frozenset("bBhHiIlLqQ")


def as_token_array(tokens: TokenIds) -> array[int]:
    """Return ``tokens`` as array('I'). An array('I') comes back as it is, everything else as a copy.

    Raises TokensError that names the first position that is no integer of 0 to 4294967295. Bytes and text are refused:
    they are never token ids.
    """
    if isinstance(tokens, array) and tokens.typecode == "I":
        return tokens
    if isinstance(tokens, str | bytes | bytearray):
        raise TokensError(f"{type(tokens).__name__} is not token ids")
    if isinstance(tokens, Sequence) and not isinstance(tokens, memoryview | array):
        return _from_values(tokens)
    try:
        view = memoryview(tokens)
    except TypeError:
        raise TokensError(f"{type(tokens).__name__} is neither a sequence of integers nor a buffer") from None
    return _from_view(view)


def _from_view(view: memoryview) -> array[int]:
    if view.ndim != 1:
        raise TokensError(f"expected one dimension, got shape {view.shape}")
    kind = view.format.lstrip("@=<")
    if kind not in _INTEGER_FORMATS:
        raise TokensError(f"buffer of format {view.format!r} does not hold native integers")
    if kind in ("I", "L") and view.itemsize == 4 and view.c_contiguous:
        ids = array("I")
        ids.frombytes(view.cast("B"))
        return ids
    return _from_values(view.tolist())


def _from_values(values: Sequence[Any]) -> array[int]:
    try:
        return array("I", values)
    except (TypeError, OverflowError):
        for position, value in enumerate(values):
            if not isinstance(value, int) or not 0 <= value <= TOKEN_ID_MAX:
                raise TokensError(f"{value!r:.40} is not a token id", position) from None
        return array("I", [int(value) for value in values])
