"""Which headers pass the proxy."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.serve.proxy.headers import (
    HOP_BY_HOP,
    Client,
    Pair,
    by_name,
    framing_problem,
    to_client,
    to_engine,
)
from kvatlas.serve.routing.asked import CONSUMED

CLIENT = Client("10.0.0.5", "http")
TOKEN = string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~"

names = st.one_of(
    st.text(TOKEN, min_size=1, max_size=12),
    st.sampled_from(
        sorted(name.decode() for name in HOP_BY_HOP) + sorted(CONSUMED) + ["Host", "Content-Length", "X-A", "Expect"]
    ),
)
values = st.text("".join(map(chr, range(32, 127))), max_size=20).map(str.strip)
connection = st.lists(names, max_size=3).map(lambda listed: ("Connection", " ,".join(listed)))
pairs = st.lists(st.one_of(st.tuples(names, values), connection), max_size=12).map(
    lambda listed: [(name.encode(), value.encode()) for name, value in listed]
)


def sent(headers: list[Pair], **more: object) -> list[Pair]:
    options: dict[str, object] = {"host": "10.0.0.1:8000", "body_bytes": 5, "client": CLIENT, "routing": {}, **more}
    return to_engine(headers, **options)  # type: ignore[arg-type]


@given(pairs)
def test_no_hop_by_hop_or_routing_header_of_a_client_reaches_an_engine(headers: list[Pair]) -> None:
    through = {name.lower() for name, _ in sent(headers)}
    named = {one.strip().lower() for name, value in headers if name.lower() == b"connection" for one in value.split(b",")}
    own = {b"host", b"content-length", b"x-forwarded-for", b"x-forwarded-proto"}
    assert not through & HOP_BY_HOP
    assert not through & {name.encode() for name in CONSUMED}
    assert not (through - own) & named


@given(pairs)
def test_a_request_has_one_host_and_one_length_both_ours(headers: list[Pair]) -> None:
    through = sent(headers)
    assert [value for name, value in through if name.lower() == b"host"] == [b"10.0.0.1:8000"]
    assert [value for name, value in through if name.lower() == b"content-length"] == [b"5"]
    assert framing_problem(through) is None


@given(pairs)
def test_what_the_router_sets_is_there_once(headers: list[Pair]) -> None:
    through = sent(headers, routing={"x-request-id": "r1", "x-prefiller-host-port": "10.0.0.2:8000"})
    for name, value in ((b"x-request-id", b"r1"), (b"x-prefiller-host-port", b"10.0.0.2:8000")):
        assert [v for n, v in through if n.lower() == name] == [value]


@given(pairs)
def test_other_headers_pass_as_they_are_and_in_their_order(headers: list[Pair]) -> None:
    plain = [pair for pair in headers if pair[0].lower().startswith(b"x-a")]
    rest = [pair for pair in headers if pair[0].lower() != b"connection"]
    assert [pair for pair in sent(rest) if pair[0].lower().startswith(b"x-a")] == plain


@given(pairs)
def test_no_hop_by_hop_header_of_an_engine_reaches_a_client(headers: list[Pair]) -> None:
    through = {name.lower().encode() for name, _ in to_client(headers)}
    assert not through & HOP_BY_HOP
    assert (b"content-length" in through) == any(name.lower() == b"content-length" for name, _ in headers)


@pytest.mark.parametrize(
    ("headers", "fine"),
    [
        ([], True),
        ([(b"Content-Length", b"10")], True),
        ([(b"Transfer-Encoding", b"Chunked")], True),
        ([(b"content-length", b"10"), (b"Content-Length", b"10")], False),
        ([(b"content-length", b"10"), (b"transfer-encoding", b"chunked")], False),
        ([(b"content-length", b"10, 10")], False),
        ([(b"content-length", b"")], False),
        ([(b"content-length", b"-1")], False),
        ([(b"content-length", "\u0661".encode())], False),
        ([(b"content-length", b"9" * 19)], False),
        ([(b"transfer-encoding", b"gzip, chunked")], False),
        ([(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")], False),
    ],
)
def test_a_length_that_could_be_read_in_two_ways_is_a_problem(headers: list[Pair], fine: bool) -> None:
    assert (framing_problem(headers) is None) is fine


def test_headers_of_equal_names_are_joined() -> None:
    assert by_name([(b"Accept", b"a"), (b"ACCEPT", b"b"), (b"X", b"\xe9")]) == {"accept": "a, b", "x": "\xe9"}


@pytest.mark.parametrize(
    ("own", "keep", "expected"),
    [(None, True, [b"client"]), (None, False, []), ("proxy", True, [b"proxy"]), ("proxy", False, [b"proxy"])],
)
def test_authorization_is_the_client_s_or_the_proxy_s_own(own: str | None, keep: bool, expected: list[bytes]) -> None:
    routing = {} if own is None else {"authorization": own}
    through = sent([(b"Authorization", b"client")], routing=routing, keep_authorization=keep)
    assert [value for name, value in through if name.lower() == b"authorization"] == expected


def test_the_client_s_address_is_added_to_those_before() -> None:
    through = sent([(b"X-Forwarded-For", b"1.1.1.1"), (b"x-forwarded-for", b"2.2.2.2"), (b"X-Forwarded-Proto", b"gopher")])
    assert (b"x-forwarded-for", b"1.1.1.1, 2.2.2.2, 10.0.0.5") in through
    assert [value for name, value in through if name == b"x-forwarded-proto"] == [b"http"]
