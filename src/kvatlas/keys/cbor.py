"""Canonical CBOR (RFC 8949, section 4.2) of the few types that are hashed: by vLLM, and by llm-d."""

from __future__ import annotations


def cbor(value: object) -> bytes:
    """Return a value as bytes; lone surrogates of a text are kept, though no engine could hash them."""
    if value is None:
        return b"\xf6"
    if isinstance(value, int) and not isinstance(value, bool):
        return _head(0, value) if value >= 0 else _head(1, -1 - value)
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return _head(3, len(text)) + text
    if isinstance(value, tuple):
        return _head(4, len(value)) + b"".join(map(cbor, value))
    if isinstance(value, dict) and len(value) == 1:  # with more, their order would matter
        ((key, item),) = value.items()
        return _head(5, 1) + cbor(key) + cbor(item)
    raise TypeError(f"{type(value).__name__} has no place in a block hash")


def _head(major: int, number: int) -> bytes:
    """Return a type and a number (the value itself, or a length) in as few bytes as hold it."""
    if number < 24:
        return bytes([major << 5 | number])
    for info, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << 8 * size:
            return bytes([major << 5 | info]) + number.to_bytes(size, "big")
    raise ValueError(f"{number} needs more than 64 bits")
