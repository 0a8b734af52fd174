"""What routers say to each other, as bytes: a version, then msgpack. Whatever else comes in is refused whole."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from kvatlas.errors import DecodeError

VERSION = 2
LOADS_MAX = 10_000
"""Endpoints of which one message tells; of further ones it says nothing."""
ROUTES_MAX = 4_096
CHAIN_MAX = 4_096
"""Hashes of one prompt; of a longer one the beginning is told."""
MESSAGE_BYTES_MAX = 8 << 20
_HASH_BYTES = 8

_Name = Annotated[str, Meta(min_length=1, max_length=512)]
_Count = Annotated[int, Meta(ge=0, le=1 << 40)]
_Pairs = Annotated[int, Meta(ge=0, le=1 << 60)]


class EndpointLoad(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one router has in flight at an endpoint: all of it."""

    endpoint: _Name
    requests: _Count
    tokens: _Count
    prefill_requests: _Count
    prefill_tokens: _Count
    prefill_pairs: _Pairs


class Route(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A prompt that was sent somewhere, as a plugin of the sender remembers it."""

    plugin: _Name
    kind: Annotated[str, Meta(max_length=64)]
    endpoints: Annotated[tuple[_Name, ...], Meta(min_length=1, max_length=4)]
    chain: Annotated[bytes, Meta(max_length=CHAIN_MAX * _HASH_BYTES)]
    """See :func:`pack`."""


class Told(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One message."""

    router: Annotated[int, Meta(ge=0)]
    """Who tells: a number that it drew when it started."""
    number: Annotated[int, Meta(ge=0)]
    """Of its messages, without gaps: a gap is a loss."""
    complete: bool
    """Endpoints that are not named have nothing in flight; otherwise they have what was told before."""
    loads: Annotated[tuple[EndpointLoad, ...], Meta(max_length=LOADS_MAX)] = ()
    routes: Annotated[tuple[Route, ...], Meta(max_length=ROUTES_MAX)] = ()


def encode(told: Told) -> bytes:
    return _VERSION + _encoder.encode(told)


def decode(message: bytes) -> Told:
    """Return what a router said. Raises DecodeError with the reason too_large, version or malformed."""
    if len(message) > MESSAGE_BYTES_MAX:
        raise DecodeError("too_large", f"{len(message)} bytes, more than {MESSAGE_BYTES_MAX}")
    if message[:1] != _VERSION:
        raise DecodeError("version", f"the other router speaks version {message[:1].hex() or 'none'}, this one {VERSION}")
    try:
        told = _decoder.decode(memoryview(message)[1:])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DecodeError("malformed", str(error)[:200]) from None
    if any(len(route.chain) % _HASH_BYTES for route in told.routes):
        raise DecodeError("malformed", f"a chain is no multiple of {_HASH_BYTES} bytes")
    return told


def pack(chain: Sequence[int]) -> bytes:
    """Return up to CHAIN_MAX hashes of 64 bits as little-endian bytes."""
    count = min(len(chain), CHAIN_MAX)
    return struct.pack(f"<{count}Q", *chain[:count])


def unpack(chain: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(chain) // _HASH_BYTES}Q", chain)


_VERSION = bytes([VERSION])
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Told)
