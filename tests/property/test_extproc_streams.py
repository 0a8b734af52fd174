"""Whatever Envoy says in whatever order, a stream ends cleanly, its trip is finished once, and nothing stays held."""

from __future__ import annotations

import asyncio
import itertools
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.errors import RequestError, RouteError
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import (
    HttpBody,
    ProcessingRequest,
    ProcessingResponse,
)
from kvatlas.serve.extproc.held import Room
from kvatlas.serve.extproc.modes import ProtocolError
from kvatlas.serve.extproc.stream import Ask, Exchange, Limits, Replies
from tests.models.picker import Picker

PICKER = Picker(["10.0.0.1:8000", "10.0.0.2:8000"])
KINDS = ("request_headers", "request_body", "request_trailers", "response_headers", "response_body", "response_trailers")


def run(messages: list[ProcessingRequest], room: Room) -> list[ProcessingResponse]:
    """Carry messages as the server does; return all that was said."""
    said: list[ProcessingResponse] = []
    exchange = Exchange(Limits(body_bytes_max=400_000, headers_bytes_max=2_000), room, lambda: 1.0)
    try:
        for message in messages:
            told = exchange.receive(message)
            said += asyncio.run(decide(exchange, told)) if isinstance(told, Ask) else told
            if exchange.over:
                assert exchange.receive(message) == ()
                break
    except ProtocolError:
        pass
    finally:
        exchange.close()
    return said


async def decide(exchange: Exchange, ask: Ask) -> Replies:
    try:
        if ask.body is None:
            return exchange.decided(PICKER.dispatcher.dispatch_bare(ask.path, ask.headers, ask.subset))
        return exchange.decided(await PICKER.dispatcher.dispatch(ask.path, ask.headers, ask.body, ask.subset))
    except (RequestError, RouteError) as error:
        return exchange.refused(error)


headers = st.dictionaries(
    st.sampled_from([":path", ":status", "content-length", "content-type", "x-llm-d-slo-ttft-ms", "x-request-id", "prefer"]),
    st.sampled_from(["/v1/completions", "200", "503", "-1", "12", "text/event-stream", "if-available", "x" * 900, ""]),
)
bodies = st.one_of(st.binary(max_size=40), st.just(b'{"model": "m"}'), st.just(b'data: {"usage": {"prompt_tokens": 4}}\n\n'))


@st.composite
def messages(draw: st.DrawFn) -> ProcessingRequest:
    message = ProcessingRequest()
    kind = draw(st.sampled_from([*KINDS, "nothing"]))
    if kind.endswith("headers"):
        part = getattr(message, kind)
        part.end_of_stream = draw(st.booleans())
        for name, value in draw(headers).items():
            part.headers.headers.add(key=name, raw_value=value.encode())
    elif kind.endswith("body"):
        getattr(message, kind).CopyFrom(HttpBody(body=draw(bodies), end_of_stream=draw(st.booleans())))
    elif kind.endswith("trailers"):
        getattr(message, kind).SetInParent()
    if draw(st.booleans()):
        message.protocol_config.request_body_mode = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 9]))
        message.protocol_config.response_body_mode = draw(st.sampled_from([0, 1, 2, 4, 9]))
        message.protocol_config.send_body_without_waiting_for_header_response = draw(st.booleans())
    message.observability_mode = draw(st.integers(0, 20)) == 0
    if draw(st.booleans()):
        hint = draw(st.sampled_from([[], ["10.0.0.1"], "10.0.0.1, 10.0.0.2:8000", 3.0, [1.0], None]))
        message.metadata_context.filter_metadata["envoy.lb.subset_hint"].update({"x-gateway-destination-endpoint-subset": hint})
    return message


@given(st.lists(messages(), max_size=12))
@settings(deadline=None, max_examples=300)
def test_any_messages_end_cleanly(sequence: list[ProcessingRequest]) -> None:
    PICKER.outcomes.seen.clear()
    room = Room(1 << 20)
    said = run(sequence, room)
    sent = sum(one.HasField("dynamic_metadata") for one in said)
    assert len(PICKER.outcomes.seen) == sent
    assert PICKER.in_flight == 0
    assert room.used_bytes == 0
    assert not any(one.HasField("immediate_response") for one in said[:-1])


@given(
    length=st.sampled_from([0, 1, 100, 61_990, 62_000, 62_026, 200_000]),
    cuts=st.lists(st.integers(0, 200_000), max_size=6),
    answer_cuts=st.lists(st.integers(0, 200), max_size=6),
    trailers=st.booleans(),
    rewrite=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_however_bodies_are_cut_they_arrive_whole(
    length: int, cuts: list[int], answer_cuts: list[int], trailers: bool, rewrite: bool
) -> None:
    PICKER.outcomes.seen.clear()
    body = json.dumps({"model": "m", "prompt": "x" * length}).encode()
    answer = b'data: {"choices": []}\n\ndata: {"usage": {"prompt_tokens": 7}}\n\n'
    first = ProcessingRequest()
    first.request_headers.headers.headers.add(key=":path", raw_value=b"/v1/completions")
    if rewrite:
        first.request_headers.headers.headers.add(key="x-llm-d-model-name-rewrite", raw_value=b"other")
    sequence = [first, *(ProcessingRequest(request_body=HttpBody(body=piece)) for piece in cut(body, cuts))]
    if trailers:
        sequence.append(ProcessingRequest())
        sequence[-1].request_trailers.SetInParent()
    else:
        sequence.append(ProcessingRequest(request_body=HttpBody(end_of_stream=True)))
    sequence.append(ProcessingRequest())
    sequence[-1].response_headers.headers.headers.add(key=":status", raw_value=b"200")
    sequence[-1].response_headers.headers.headers.add(key="content-type", raw_value=b"text/event-stream")
    sequence += [ProcessingRequest(response_body=HttpBody(body=piece)) for piece in cut(answer, answer_cuts)]
    sequence.append(ProcessingRequest(response_body=HttpBody(end_of_stream=True)))

    said = run(sequence, Room(1 << 20))

    asked = [one.request_body.response.body_mutation.streamed_response for one in said if one.HasField("request_body")]
    whole = b"".join(piece.body for piece in asked)
    assert json.loads(whole) == {**json.loads(body), "model": "other" if rewrite else "m"}
    assert [piece.end_of_stream for piece in asked] == [*[False] * (len(asked) - 1), not trailers]
    assert all(len(piece.body) <= 62_000 for piece in asked)
    answered = [one.response_body.response.body_mutation.streamed_response for one in said if one.HasField("response_body")]
    assert b"".join(piece.body for piece in answered) == answer
    assert [outcome.prompt_tokens for _, outcome in PICKER.outcomes.seen] == [7]


def cut(whole: bytes, at: list[int]) -> list[bytes]:
    places = [0, *sorted(min(place, len(whole)) for place in at), len(whole)]
    return [whole[start:end] for start, end in itertools.pairwise(places)]
