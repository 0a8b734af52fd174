"""Which headers pass the proxy, in both directions. Pure.

Names are compared in lower case; pairs are bytes, as they were on the wire. Source: RFC 9110 section 7.6 (hop-by-hop headers),
RFC 9112 section 6 (framing).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvatlas.serve.routing.asked import CONSUMED, REQUEST_ID

Pair = tuple[bytes, bytes]

EXPLAIN = "x-kvatlas-explain"

HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    }
)

_OWN_OF_REQUESTS = (
    HOP_BY_HOP
    | {name.encode() for name in CONSUMED}
    | {REQUEST_ID.encode(), EXPLAIN.encode()}
    # Set anew for the engine. Answers stay uncompressed: their usage is read.
    | {b"host", b"content-length", b"expect", b"accept-encoding", b"x-forwarded-for", b"x-forwarded-proto"}
)
_ROUTING = CONSUMED | {REQUEST_ID}
_OWN_OF_ANSWERS = HOP_BY_HOP | {REQUEST_ID.encode()}

DROPPED_OF_REQUESTS = tuple(sorted(name.decode() for name in _OWN_OF_REQUESTS))
"""Names of a client's headers that no engine gets as they came."""
DROPPED_OF_ANSWERS = tuple(sorted(name.decode() for name in _OWN_OF_ANSWERS))
"""Names of an engine's headers that no client gets as they came."""


def by_name(headers: Iterable[Pair]) -> dict[str, str]:
    """Return headers by lower-case name; of equal names the values, joined as RFC 9110 section 5.3 says."""
    found: dict[str, str] = {}
    for name, value in headers:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def framing_problem(headers: Iterable[Pair]) -> str | None:
    """Return why a request's length could be read in two ways; None where it can't. Such requests are refused, not repaired."""
    lengths = [value.strip() for name, value in headers if name.lower() == b"content-length"]
    codings = [value.strip().lower() for name, value in headers if name.lower() == b"transfer-encoding"]
    if lengths and codings:
        return "it has both Content-Length and Transfer-Encoding"
    if len(lengths) > 1:
        return "it has Content-Length more than once"
    if lengths and not (lengths[0].isdigit() and len(lengths[0]) <= 18):
        return "its Content-Length is no number"
    if codings and codings != [b"chunked"]:
        return "its Transfer-Encoding is not chunked"
    return None


class Client:
    """What the proxy knows of who sent a request."""

    __slots__ = ("address", "scheme")

    def __init__(self, address: str, scheme: str) -> None:
        self.address = address
        self.scheme = scheme


def to_engine(
    headers: Sequence[Pair],
    *,
    host: str,
    body_bytes: int | None,
    client: Client,
    routing: Mapping[str, str],
    keep_authorization: bool = True,
) -> list[Pair]:
    """Return a request's headers as an engine gets them.

    ``routing``: what the router sets, in place of the client's. The client's authorization goes on if ``keep_authorization``.
    """
    named = _named_by_connection(headers)
    dropped = _OWN_OF_REQUESTS | named if named else _OWN_OF_REQUESTS
    overridden = routing.keys() - _ROUTING
    if overridden:
        dropped = dropped | {name.encode("latin-1") for name in overridden}
    if not keep_authorization:
        dropped = dropped | {b"authorization"}
    forwarded = [value for name, value in headers if name.lower() == b"x-forwarded-for"]
    sent: list[Pair] = [(b"host", host.encode("latin-1"))]
    sent += [pair for pair in headers if pair[0].lower() not in dropped]
    sent.append((b"x-forwarded-for", b", ".join([*forwarded, client.address.encode("latin-1")])))
    sent.append((b"x-forwarded-proto", client.scheme.encode("latin-1")))
    sent += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in routing.items()]
    if body_bytes is not None:
        sent.append((b"content-length", b"%d" % body_bytes))
    return sent


def to_client(headers: Sequence[Pair]) -> list[tuple[str, str]]:
    """Return an answer's headers as its client gets them. Content-Length stays: bodies are passed as they are."""
    dropped = _OWN_OF_ANSWERS | _named_by_connection(headers)
    return [
        (name.decode("latin-1"), value.decode("utf-8", "replace")) for name, value in headers if name.lower() not in dropped
    ]


def _named_by_connection(headers: Sequence[Pair]) -> frozenset[bytes]:
    """Return what Connection names, less what frames a body: that is not the sender's to hide."""
    values = [value for name, value in headers if name.lower() == b"connection"]
    if not values:
        return frozenset()
    return frozenset(name.strip().lower() for value in values for name in value.split(b",")) - {b"content-length", b"host"}
