"""Header blocks. Source: RFC 7541.

Peers are told that we keep no dynamic table. From then on a block says the same whenever it comes, and what was read once is
looked up; an Envoy sends the same block with nearly every stream.
"""

from __future__ import annotations

from collections.abc import Mapping

from hpack import Decoder
from hpack.exceptions import HPACKError

from kvatlas.serve.h2.frames import ErrorCode, H2Error

LIST_BYTES_MAX = 16 << 10
BLOCKS_KEPT_MAX = 512

RESPONSE = b"\x88" + b"\x0f\x10\x10application/grpc"
""":status 200 and content-type, of the static table."""


class HeaderReader:
    """Reads one connection's blocks, in their order."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=LIST_BYTES_MAX)
        self._seen: dict[bytes, Mapping[str, str]] = {}
        self._told = False

    def table_gone(self) -> None:
        """The peer knows that there is no dynamic table: a block that wants one is an error from now on."""
        self._decoder.max_allowed_table_size = 0
        self._told = True

    def read(self, block: bytes) -> Mapping[str, str]:
        """Return headers by name. Raises H2Error."""
        found = self._seen.get(block)
        if found is not None:
            return found
        keeps = self._told and self._decoder.header_table_size == 0
        try:
            headers = {str(name): str(value) for name, value in self._decoder.decode(block)}
        except (HPACKError, UnicodeDecodeError) as error:
            raise H2Error(ErrorCode.COMPRESSION_ERROR, f"headers cannot be read: {error}") from None
        if keeps:
            if len(self._seen) >= BLOCKS_KEPT_MAX:
                self._seen.clear()
            self._seen[block] = headers
        return headers


def trailers(status: int, message: str = "") -> bytes:
    """Return gRPC's trailers as a block."""
    block = _literal(b"grpc-status", b"%d" % status)
    return block + _literal(b"grpc-message", _percent(message)) if message else block


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\x00" + _length(len(name)) + name + _length(len(value)) + value


def _length(count: int) -> bytes:
    """Return a length as RFC 7541, 5.1 has it, with a prefix of 7 bits."""
    if count < 127:
        return bytes((count,))
    parts = bytearray((127,))
    count -= 127
    while count >= 128:
        parts.append(count % 128 + 128)
        count //= 128
    parts.append(count)
    return bytes(parts)


def _percent(text: str) -> bytes:
    return b"".join(b"%c" % byte if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte for byte in text.encode())
