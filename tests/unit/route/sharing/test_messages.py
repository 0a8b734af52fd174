"""What comes from other routers is taken as it was told, or refused whole."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.errors import DecodeError
from kvatlas.route.sharing.messages import CHAIN_MAX, EndpointLoad, Route, Told, decode, encode, pack, unpack

HASHES = st.lists(st.integers(0, (1 << 64) - 1), max_size=50)
NAMES = st.text(min_size=1, max_size=20)
COUNTS = st.integers(0, 1 << 40)
PAIRS = st.integers(0, 1 << 60)
TOLD = st.builds(
    Told,
    router=st.integers(0, (1 << 63) - 1),
    number=st.integers(0, (1 << 63) - 1),
    complete=st.booleans(),
    loads=st.lists(st.builds(EndpointLoad, NAMES, COUNTS, COUNTS, COUNTS, COUNTS, PAIRS), max_size=3).map(tuple),
    routes=st.lists(
        st.builds(Route, NAMES, NAMES, st.lists(NAMES, min_size=1, max_size=4).map(tuple), HASHES.map(pack)), max_size=3
    ).map(tuple),
)


@given(TOLD)
def test_a_message_is_read_as_it_was_told(told: Told) -> None:
    assert decode(encode(told)) == told


@given(HASHES)
def test_a_chain_is_unpacked_as_it_was_packed(hashes: list[int]) -> None:
    assert list(unpack(pack(hashes))) == hashes


def test_of_a_long_chain_the_beginning_is_told() -> None:
    assert unpack(pack(range(CHAIN_MAX + 10))) == tuple(range(CHAIN_MAX))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(message: bytes) -> None:
    for one in (message, b"\x02" + message):
        with suppress(DecodeError):
            decode(one)


@given(TOLD, st.data())
def test_a_damaged_message_is_read_or_refused(told: Told, data: st.DataObject) -> None:
    message = bytearray(encode(told))
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    with suppress(DecodeError):
        decode(bytes(message[: data.draw(st.integers(0, len(message)))]))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "version"),
        (b"\x01" + encode(Told(1, 0, True))[1:], "version"),
        (b"\x02" + b"\x91" * 5000, "malformed"),
        (b"\x02" + msgspec.msgpack.encode([1, 0, True, [], [], "more"]), "malformed"),
        (b"\x02" + msgspec.msgpack.encode([-1, 0, True]), "malformed"),
        (b"\x02" + msgspec.msgpack.encode([1, 0, True, [["a", -1, 0, 0, 0, 0]]]), "malformed"),
        (b"\x02" + msgspec.msgpack.encode([1, 0, True, [["", 1, 0, 0, 0, 0]]]), "malformed"),
        (b"\x02" + msgspec.msgpack.encode([1, 0, True, [], [["p", "k", ["e"], b"1234567"]]]), "malformed"),
        (b"\x02" + msgspec.msgpack.encode([1, 0, True, [], [["p", "k", [], b""]]]), "malformed"),
        (b"\x02" + msgspec.msgpack.encode([1, 0, True, [], [["p", "k", ["e"], bytes(8 * CHAIN_MAX + 8)]]]), "malformed"),
        (bytes(9 << 20), "too_large"),
    ],
)
def test_what_is_no_message_is_refused_with_a_reason(message: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(message)
    assert caught.value.reason == reason
