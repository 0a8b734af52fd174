"""Envoy's messages: what is read of them, and how answers are put together. Values in, values out.

Sources: Envoy's API v3 (external_processor.proto); the endpoint-picker protocol of the Gateway API inference extension;
llm-d-router, ``handlers`` (headers that are set and removed, chunk size).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kvatlas.errors import RequestError
from kvatlas.proto.envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValueOption, Metadata
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import HeaderMutation, ProcessingResponse
from kvatlas.serve.routing.asked import CONSUMED, DESTINATION
from kvatlas.serve.routing.refusals import Refusal

CHUNK_BYTES_MAX = 62_000
"""Of a body sent back to Envoy: its limit for a message is 64 KiB."""

LB_NAMESPACE = "envoy.lb"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET = "x-gateway-destination-endpoint-subset"
SERVED = "x-gateway-destination-endpoint-served"
WENT_INTO_RESPONSE = "x-went-into-resp-headers"

_OVERWRITE = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def header_bytes(headers: HeaderMap) -> int:
    """Return how long all names and values are together."""
    return sum(len(header.key) + len(header.raw_value or header.value) for header in headers.headers)


def read_headers(headers: HeaderMap) -> dict[str, str]:
    """Return headers by lower-case name; several of one name are joined with commas."""
    found: dict[str, str] = {}
    for header in headers.headers:
        name = header.key.lower()
        value = header.raw_value.decode("latin-1") or header.value
        found[name] = f"{found[name]},{value}" if name in found else value
    return found


def subset_hint(metadata: Metadata) -> frozenset[str] | None:
    """Return the addresses that the gateway allows; None where it does not say. Raises RequestError for a hint that is none."""
    if SUBSET_NAMESPACE not in metadata.filter_metadata:
        return None
    fields = metadata.filter_metadata[SUBSET_NAMESPACE].fields
    if SUBSET not in fields:
        return None
    hint = fields[SUBSET]
    kind = hint.WhichOneof("kind")
    if kind == "string_value":
        given: Iterable[str] = hint.string_value.split(",")
    elif kind == "list_value" and all(one.WhichOneof("kind") == "string_value" for one in hint.list_value.values):
        given = [one.string_value for one in hint.list_value.values]
    else:
        raise hint_error()
    return frozenset(address.strip() for address in given if address.strip())


def hint_error() -> RequestError:
    """Return what is wrong with a hint that is none."""
    return RequestError(f"{SUBSET_NAMESPACE}.{SUBSET}", "is no list of addresses", 'have the gateway send ["ip:port", ...]')


def served_by(headers: Mapping[str, str], metadata: Metadata) -> str | None:
    """Return the address that the gateway says it sent the request to, where it says so."""
    if LB_NAMESPACE in metadata.filter_metadata:
        fields = metadata.filter_metadata[LB_NAMESPACE].fields
        if SERVED in fields and fields[SERVED].string_value:
            return fields[SERVED].string_value
    return headers.get(SERVED)


def send_to(
    reply: ProcessingResponse, mutation: HeaderMutation, ours: Mapping[str, str], theirs: Iterable[str], length: int | None
) -> None:
    """Put a decision into an answer: the headers to set, those of the client's to remove, and the load balancer's metadata.

    ``ours``: of the decision; ``theirs``: names the client sent; ``length``: of a body whose length Envoy does not know.
    """
    set_headers(mutation, ours)
    if length is not None:
        set_headers(mutation, {"content-length": str(length)})
    mutation.remove_headers.extend(name for name in theirs if name in CONSUMED and name not in ours)
    reply.dynamic_metadata.fields[LB_NAMESPACE].struct_value.fields[DESTINATION].string_value = ours[DESTINATION]


def set_headers(mutation: HeaderMutation, headers: Mapping[str, str]) -> None:
    """Have headers set, in place of any that there are."""
    for name, value in headers.items():
        option = mutation.set_headers.add(append_action=_OVERWRITE)
        option.header.key = name
        option.header.raw_value = value.encode("latin-1", "replace")


def body_chunks(body: bytes, *, ends: bool) -> Iterator[ProcessingResponse]:
    """Return a request's body in messages that Envoy takes. ``ends``: nothing follows, not even trailers."""
    for start in range(0, len(body) or ends, CHUNK_BYTES_MAX):
        chunk = body[start : start + CHUNK_BYTES_MAX]
        reply = ProcessingResponse()
        streamed = reply.request_body.response.body_mutation.streamed_response
        streamed.body = chunk
        streamed.end_of_stream = ends and start + CHUNK_BYTES_MAX >= len(body)
        yield reply


def answer_chunk(body: bytes, *, ends: bool) -> ProcessingResponse:
    """Return a piece of the engine's answer as it came."""
    reply = ProcessingResponse()
    streamed = reply.response_body.response.body_mutation.streamed_response
    streamed.body = body
    streamed.end_of_stream = ends
    return reply


def unchanged(kind: str) -> ProcessingResponse:
    """Return the answer to a message of which nothing is to be changed."""
    reply = ProcessingResponse()
    if kind.endswith("trailers"):
        getattr(reply, kind).SetInParent()
    else:
        getattr(reply, kind).response.SetInParent()
    return reply


def immediate(told: Refusal) -> ProcessingResponse:
    """Return the answer that ends a request here."""
    reply = ProcessingResponse()
    answer = reply.immediate_response
    answer.status.code = told.status
    set_headers(answer.headers, dict(told.headers))
    answer.body = told.body
    answer.details = "kvatlas_refused"
    return reply
