"""One HTTP request as Envoy tells it: what is held, what is sent back, and how its trip ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from kvatlas.errors import NoEndpointError, RequestError
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import (
    HeaderMutation,
    HttpBody,
    ProcessingRequest,
    ProcessingResponse,
)
from kvatlas.route.outcome import End
from kvatlas.serve.extproc.held import Room
from kvatlas.serve.extproc.messages import SUBSET, SUBSET_NAMESPACE
from kvatlas.serve.extproc.modes import ProtocolError
from kvatlas.serve.extproc.stream import Ask, Exchange, Limits, Replies
from tests.models.picker import Picker

BODY = json.dumps({"model": "tiny", "prompt": "one two three"}).encode()
POST = {":method": "POST", ":path": "/v1/completions?x=1", "content-type": "application/json"}
MODES = {"NONE": 0, "STREAMED": 1, "BUFFERED": 2, "BUFFERED_PARTIAL": 3, "FULL_DUPLEX_STREAMED": 4, "GRPC": 5}


class Told:
    """An exchange with a picker behind it, and a clock that is told."""

    def __init__(self, picker: Picker | None = None, body_bytes_max: int = 1 << 20, room: Room | None = None) -> None:
        self.picker = picker or Picker(["10.0.0.1:8000", "10.0.0.2:8000"])
        self.now_s = 100.0
        self.room = room or Room(1 << 30)
        self.exchange = Exchange(Limits(body_bytes_max, 4096), self.room, lambda: self.now_s)

    async def tell(self, message: ProcessingRequest) -> Replies:
        said = self.exchange.receive(message)
        return await self.decide(said) if isinstance(said, Ask) else said

    async def decide(self, ask: Ask) -> Replies:
        dispatcher = self.picker.dispatcher
        try:
            if ask.body is None:
                return self.exchange.decided(dispatcher.dispatch_bare(ask.path, ask.headers, ask.subset))
            return self.exchange.decided(await dispatcher.dispatch(ask.path, ask.headers, ask.body, ask.subset))
        except (RequestError, NoEndpointError) as error:
            return self.exchange.refused(error)

    async def ask(self, body: bytes = BODY, **more: Any) -> Replies:
        assert await self.tell(request_headers(**more)) == ()
        return await self.tell(request_body(body, ends=True))


def request_headers(
    headers: Mapping[str, str] = POST,
    *,
    ends: bool = False,
    mode: str = "FULL_DUPLEX_STREAMED",
    answer_mode: str = "FULL_DUPLEX_STREAMED",
    at_once: bool = False,
    subset: object = None,
) -> ProcessingRequest:
    message = ProcessingRequest()
    message.protocol_config.request_body_mode = MODES[mode]  # type: ignore[assignment]
    message.protocol_config.response_body_mode = MODES[answer_mode]  # type: ignore[assignment]
    message.protocol_config.send_body_without_waiting_for_header_response = at_once
    message.request_headers.end_of_stream = ends
    for name, value in headers.items():
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    if subset is not None:
        message.metadata_context.filter_metadata[SUBSET_NAMESPACE].update({SUBSET: subset})
    return message


def request_body(body: bytes, *, ends: bool = False) -> ProcessingRequest:
    return ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=ends))


def request_trailers() -> ProcessingRequest:
    message = ProcessingRequest()
    message.request_trailers.SetInParent()
    return message


def response_headers(status: int = 200, *, ends: bool = False, **headers: str) -> ProcessingRequest:
    message = ProcessingRequest()
    message.response_headers.end_of_stream = ends
    for name, value in {":status": str(status), **headers}.items():
        message.response_headers.headers.headers.add(key=name.replace("_", "-"), raw_value=value.encode())
    return message


def response_body(body: bytes, *, ends: bool = False) -> ProcessingRequest:
    return ProcessingRequest(response_body=HttpBody(body=body, end_of_stream=ends))


def response_trailers() -> ProcessingRequest:
    message = ProcessingRequest()
    message.response_trailers.SetInParent()
    return message


def set_in(mutation: HeaderMutation) -> dict[str, str]:
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


def kinds(replies: Replies) -> list[str | None]:
    return [reply.WhichOneof("response") for reply in replies]


def streamed(replies: Sequence[ProcessingResponse], kind: str = "request_body") -> list[tuple[int, bool]]:
    pieces = [getattr(reply, kind).response.body_mutation.streamed_response for reply in replies if reply.HasField(kind)]  # type: ignore[arg-type]
    return [(len(piece.body), piece.end_of_stream) for piece in pieces]


async def test_a_request_is_held_until_its_body_is_complete_and_then_sent_back_with_its_destination() -> None:
    told = Told()
    assert await told.tell(request_headers()) == ()
    assert await told.tell(request_body(BODY[:10])) == ()
    assert await told.tell(request_body(BODY[10:])) == ()
    replies = await told.tell(request_body(b"", ends=True))
    assert kinds(replies) == ["request_headers", "request_body"]
    common = replies[0].request_headers.response
    assert common.clear_route_cache
    headers = set_in(common.header_mutation)
    assert headers["x-gateway-destination-endpoint"] == "10.0.0.2:8000"
    assert headers["content-length"] == str(len(BODY))
    assert headers["x-request-id"]
    lb = replies[0].dynamic_metadata.fields["envoy.lb"].struct_value
    assert lb.fields["x-gateway-destination-endpoint"].string_value == "10.0.0.2:8000"
    assert replies[1].request_body.response.body_mutation.streamed_response.body == BODY
    assert told.picker.in_flight == 1


async def test_a_long_body_goes_back_in_pieces_that_envoy_takes() -> None:
    told = Told()
    body = json.dumps({"model": "tiny", "prompt": "x" * 150_000}).encode()
    replies = await told.ask(body)
    assert streamed(replies) == [(62_000, False), (62_000, False), (len(body) - 124_000, True)]


@pytest.mark.parametrize("length", [62_000, 124_000])
async def test_a_body_of_whole_pieces_has_no_empty_one_behind_it(length: int) -> None:
    start = b'{"model":"tiny","prompt":"'
    body = start + b"x" * (length - len(start) - 2) + b'"}'
    pieces = streamed(await Told().ask(body))
    assert pieces[-1] == (62_000, True)
    assert len(pieces) == length // 62_000


async def test_a_request_with_trailers_ends_with_them() -> None:
    told = Told()
    await told.tell(request_headers())
    await told.tell(request_body(BODY))
    replies = await told.tell(request_trailers())
    assert kinds(replies) == ["request_headers", "request_body", "request_trailers"]
    assert streamed(replies) == [(len(BODY), False)]


async def test_a_request_without_a_body_goes_to_anybody() -> None:
    told = Told()
    replies = await told.tell(request_headers({":method": "GET", ":path": "/v1/models"}, ends=True))
    assert kinds(replies) == ["request_headers"]
    headers = set_in(replies[0].request_headers.response.header_mutation)
    assert headers["x-gateway-destination-endpoint"] == "10.0.0.2:8000"
    assert "content-length" not in headers


async def test_a_clients_own_routing_headers_are_not_passed_on() -> None:
    mine = {
        "x-gateway-destination-endpoint": "6.6.6.6:80",
        "x-prefiller-host-port": "6.6.6.6:80",
        "x-data-parallel-rank": "3",
        "x-llm-d-inference-fairness-id": "tenant",
        "x-other": "stays",
    }
    replies = await Told().ask(headers={**POST, **mine})
    mutation = replies[0].request_headers.response.header_mutation
    assert set_in(mutation)["x-gateway-destination-endpoint"] == "10.0.0.2:8000"
    assert set(mutation.remove_headers) == set(mine) - {"x-gateway-destination-endpoint", "x-other"}


async def test_a_model_that_is_rewritten_changes_body_and_length() -> None:
    replies = await Told().ask(headers={**POST, "x-llm-d-model-name-rewrite": "another-model"})
    body = replies[1].request_body.response.body_mutation.streamed_response.body
    assert json.loads(body) == {**json.loads(BODY), "model": "another-model"}
    assert set_in(replies[0].request_headers.response.header_mutation)["content-length"] == str(len(body))


@pytest.mark.parametrize(
    ("hint", "destination"),
    [
        (["10.0.0.1"], "10.0.0.1:8000"),
        (["10.0.0.1:8000", "10.9.9.9:1"], "10.0.0.1:8000"),
        ("10.0.0.1:8000, 10.9.9.9:1", "10.0.0.1:8000"),
        (["10.9.9.9"], None),
        ([], None),
        ("", None),
    ],
)
async def test_a_subset_hint_says_who_may_be_chosen(hint: object, destination: str | None) -> None:
    replies = await Told().ask(subset=hint)
    if destination is None:
        answer = replies[0].immediate_response
        assert answer.status.code == 503
        assert set_in(answer.headers)["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
    else:
        assert set_in(replies[0].request_headers.response.header_mutation)["x-gateway-destination-endpoint"] == destination


async def test_a_subset_hint_that_is_none_is_refused() -> None:
    told = Told()
    replies = await told.tell(request_headers(subset=7))
    assert replies[0].immediate_response.status.code == 400
    assert told.exchange.over


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt": "x"}', b"\xff\xfe", b'{"model": 3}'])
async def test_a_body_that_cannot_be_routed_is_400_as_openai_has_it(body: bytes) -> None:
    told = Told()
    (reply,) = await told.ask(body)
    assert reply.immediate_response.status.code == 400
    assert json.loads(reply.immediate_response.body)["error"]["type"] == "invalid_request_error"
    assert set_in(reply.immediate_response.headers)["content-type"] == "application/json"
    assert told.exchange.over
    assert told.picker.in_flight == 0


async def test_a_body_over_the_limit_is_413_as_soon_as_that_is_known() -> None:
    told = Told(body_bytes_max=100)
    await told.tell(request_headers())
    assert await told.tell(request_body(b"x" * 100)) == ()
    (reply,) = await told.tell(request_body(b"x"))
    assert reply.immediate_response.status.code == 413
    assert told.room.used_bytes == 0
    (reply,) = await Told(body_bytes_max=100).tell(request_headers({**POST, "content-length": "101"}))
    assert reply.immediate_response.status.code == 413


async def test_headers_over_the_limit_are_431() -> None:
    (reply,) = await Told().tell(request_headers({**POST, "x-long": "x" * 5000}))
    assert reply.immediate_response.status.code == 431


async def test_a_body_that_finds_no_room_is_429_and_what_it_held_is_given_back() -> None:
    room = Room(150)
    first, second = Told(room=room), Told(room=room)
    await first.tell(request_headers())
    await first.tell(request_body(b"x" * 100))
    await second.tell(request_headers())
    await second.tell(request_body(b"x" * 40))
    (reply,) = await second.tell(request_body(b"x" * 40))
    assert reply.immediate_response.status.code == 429
    assert room.used_bytes == 100
    first.exchange.close()
    assert room.used_bytes == 0


async def test_an_answer_passes_unchanged_and_its_first_token_and_usage_are_learnt() -> None:
    told = Told()
    await told.ask()
    told.now_s = 101.0
    (reply,) = await told.tell(response_headers(content_type="text/event-stream"))
    headers = set_in(reply.response_headers.response.header_mutation)
    assert headers == {"x-decided-for": "default/10.0.0.2:8000", "x-went-into-resp-headers": "true"}
    told.now_s = 102.5
    event = b'data: {"choices": []}\n\n'
    (reply,) = await told.tell(response_body(event))
    assert reply.response_body.response.body_mutation.streamed_response.body == event
    usage = b'data: {"usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}}\n\n'
    await told.tell(response_body(usage))
    told.now_s = 105.0
    (reply,) = await told.tell(response_body(b"", ends=True))
    assert reply.response_body.response.body_mutation.streamed_response.end_of_stream
    assert told.exchange.over
    told.exchange.close()
    ((endpoint, outcome),) = told.picker.outcomes.seen
    assert endpoint == "default/10.0.0.2:8000"
    assert (outcome.end, outcome.ttft_s, outcome.duration_s) == (End.DONE, 2.5, 5.0)
    assert (outcome.prompt_tokens, outcome.cached_tokens, outcome.output_tokens) == (9, 8, 4)
    assert told.picker.in_flight == 0


async def test_an_answer_with_trailers_ends_with_them() -> None:
    told = Told()
    await told.ask()
    await told.tell(response_headers())
    await told.tell(response_body(b"{}"))
    assert not told.exchange.over
    assert kinds(await told.tell(response_trailers())) == ["response_trailers"]
    assert [outcome.end for _, outcome in told.picker.outcomes.seen] == [End.DONE]


async def test_an_answer_in_mode_streamed_is_watched_without_being_sent_back() -> None:
    told = Told()
    await told.ask(answer_mode="STREAMED")
    await told.tell(response_headers())
    (reply,) = await told.tell(response_body(b'{"usage": {"prompt_tokens": 5}}', ends=True))
    assert reply.HasField("response_body")
    assert not reply.response_body.response.HasField("body_mutation")
    assert told.picker.outcomes.seen[0][1].prompt_tokens == 5


@pytest.mark.parametrize(
    ("status", "end"),
    [(200, End.DONE), (400, End.REFUSED), (429, End.REFUSED), (500, End.ENGINE_ERROR), (503, End.ENGINE_ERROR)],
)
async def test_an_answers_status_says_how_it_went(status: int, end: End) -> None:
    told = Told()
    await told.ask()
    await told.tell(response_headers(status, ends=True))
    assert [outcome.end for _, outcome in told.picker.outcomes.seen] == [end]


@pytest.mark.parametrize("messages", [[], [response_headers()], [response_headers(), response_body(b"data: x\n\n")]])
async def test_a_stream_that_envoy_ends_before_the_answer_is_complete_is_a_client_that_went_away(
    messages: list[ProcessingRequest],
) -> None:
    told = Told()
    await told.ask()
    for message in messages:
        await told.tell(message)
    told.exchange.close()
    told.exchange.close()
    assert [outcome.end for _, outcome in told.picker.outcomes.seen] == [End.CLIENT_GONE]
    assert told.picker.in_flight == 0


async def test_a_stream_whose_answer_is_not_shown_ends_well() -> None:
    told = Told()
    await told.ask(answer_mode="NONE")
    told.exchange.close()
    assert [outcome.end for _, outcome in told.picker.outcomes.seen] == [End.DONE]


async def test_an_engine_that_served_instead_of_the_first_choice_has_the_outcome() -> None:
    told = Told()
    told.picker.turns.targets = 2
    replies = await told.ask()
    wanted = set_in(replies[0].request_headers.response.header_mutation)["x-gateway-destination-endpoint"]
    assert wanted == "10.0.0.2:8000,10.0.0.1:8000"
    message = response_headers(ends=True)
    message.metadata_context.filter_metadata["envoy.lb"].update({"x-gateway-destination-endpoint-served": "10.0.0.1:8000"})
    await told.tell(message)
    assert [endpoint for endpoint, _ in told.picker.outcomes.seen] == ["default/10.0.0.1:8000"]


async def test_in_mode_buffered_headers_pass_and_the_body_is_answered_with_the_destination() -> None:
    told = Told()
    assert kinds(await told.tell(request_headers(mode="BUFFERED"))) == ["request_headers"]
    (reply,) = await told.tell(request_body(BODY, ends=True))
    common = reply.request_body.response
    assert common.clear_route_cache
    assert set_in(common.header_mutation)["x-gateway-destination-endpoint"] == "10.0.0.2:8000"
    assert "content-length" not in set_in(common.header_mutation)
    assert not common.HasField("body_mutation")
    assert reply.dynamic_metadata.fields["envoy.lb"]


async def test_in_mode_buffered_a_rewritten_body_takes_the_place_of_the_first() -> None:
    told = Told()
    await told.tell(request_headers({**POST, "x-llm-d-model-name-rewrite": "other"}, mode="BUFFERED"))
    (reply,) = await told.tell(request_body(BODY, ends=True))
    body = reply.request_body.response.body_mutation.body
    assert json.loads(body)["model"] == "other"
    assert set_in(reply.request_body.response.header_mutation)["content-length"] == str(len(body))


async def test_in_mode_buffered_a_request_without_a_body_is_answered_at_its_headers() -> None:
    replies = await Told().tell(request_headers({":path": "/v1/models"}, ends=True, mode="BUFFERED"))
    assert set_in(replies[0].request_headers.response.header_mutation)["x-gateway-destination-endpoint"]


async def test_in_mode_streamed_that_does_not_wait_each_piece_has_one_answer() -> None:
    told = Told()
    rewritten = {**POST, "x-llm-d-model-name-rewrite": "other"}
    assert await told.tell(request_headers(rewritten, mode="STREAMED", at_once=True)) == ()
    assert await told.tell(request_body(BODY[:9])) == ()
    replies = await told.tell(request_body(BODY[9:], ends=True))
    assert kinds(replies) == ["request_headers", "request_body", "request_body"]
    first, second = (reply.request_body.response.body_mutation for reply in replies[1:])
    assert json.loads(first.body)["model"] == "other"
    assert second.clear_body


@pytest.mark.parametrize("mode", ["STREAMED", "NONE"])
async def test_where_headers_have_to_be_answered_first_the_body_plays_no_part(mode: str) -> None:
    told = Told()
    replies = await told.tell(request_headers(mode=mode))
    assert set_in(replies[0].request_headers.response.header_mutation)["x-gateway-destination-endpoint"]
    assert kinds(await told.tell(request_body(b"anything", ends=True))) == ["request_body"]


async def test_an_answer_of_envoys_own_before_the_request_is_complete_passes() -> None:
    told = Told()
    await told.tell(request_headers())
    await told.tell(request_body(BODY[:5]))
    assert kinds(await told.tell(response_headers(408))) == ["response_headers"]
    assert await told.tell(request_body(BODY[5:])) == ()
    assert told.room.used_bytes == 0
    assert told.picker.in_flight == 0


@pytest.mark.parametrize(
    "messages",
    [
        [ProcessingRequest()],
        [request_body(b"")],
        [request_trailers()],
        [response_headers()],
        [request_headers(), request_headers()],
        [request_headers(), ProcessingRequest()],
        [request_headers(mode="GRPC")],
        [request_headers(mode="BUFFERED_PARTIAL")],
        [request_headers(), request_body(BODY, ends=True), request_body(b"more")],
        [request_headers(), request_body(BODY, ends=True), response_headers(), response_headers()],
    ],
)
async def test_messages_that_make_no_sense_fail_the_stream(messages: list[ProcessingRequest]) -> None:
    told = Told()
    for message in messages[:-1]:
        await told.tell(message)
    with pytest.raises(ProtocolError):
        await told.tell(messages[-1])
    told.exchange.close()
    assert told.picker.in_flight == 0


async def test_nobody_to_look_at_answers_is_said_clearly() -> None:
    message = request_headers()
    message.observability_mode = True
    with pytest.raises(ProtocolError, match="observability_mode: false"):
        await Told().tell(message)


async def test_an_envoy_that_does_not_say_how_it_sends_bodies_is_taken_to_be_configured_as_documented() -> None:
    told = Told()
    message = request_headers()
    message.ClearField("protocol_config")
    assert await told.tell(message) == ()
    assert kinds(await told.tell(request_body(BODY, ends=True))) == ["request_headers", "request_body"]


async def test_a_request_on_its_way_keeps_no_body() -> None:
    told = Told()
    said = told.exchange.receive(request_headers())
    said = told.exchange.receive(request_body(BODY, ends=True))
    assert isinstance(said, Ask)
    trip = await told.picker.dispatcher.dispatch(said.path, said.headers, BODY, None)
    told.exchange.decided(trip)
    assert trip.asked.body == b""
    assert told.room.used_bytes == 0


# ── what answers tell ──

LOAD = {"endpoint_load_metrics": 'JSON {"named_metrics": {"kv_cache_usage_perc": 0.4, "num_requests_waiting": 3.0}}'}


async def test_engines_are_asked_for_their_load_and_the_answer_is_learnt_and_removed() -> None:
    told = Told(Picker(["10.0.0.1:8000"], orca=True))
    head = (await told.ask())[0].request_headers.response.header_mutation
    assert set_in(head)["endpoint-load-metrics-format"] == "JSON"
    (reply,) = await told.tell(response_headers(**LOAD))
    assert list(reply.response_headers.response.header_mutation.remove_headers) == ["endpoint-load-metrics"]
    (endpoint,) = told.picker.router.endpoints
    report = told.picker.router.load(endpoint.name).report
    assert report is not None
    assert (report.waiting, report.kv_usage) == (3, 0.4)
    told.exchange.close()


async def test_a_client_that_asks_for_load_gets_it() -> None:
    told = Told()
    head = (await told.ask(headers={**POST, "endpoint-load-metrics-format": "JSON"}))[0].request_headers.response
    assert "endpoint-load-metrics-format" not in set_in(head.header_mutation)
    (reply,) = await told.tell(response_headers(**LOAD))
    assert not reply.response_headers.response.header_mutation.remove_headers
    told.exchange.close()
