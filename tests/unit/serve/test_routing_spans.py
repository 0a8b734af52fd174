"""What a request's span says: its steps, where it went and why, how it ended; and nothing of its prompt."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry

from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.errors import NoEndpointError, RequestError
from kvatlas.observe.metrics import Metrics
from kvatlas.observe.traces import Traces
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.picker_config import build_router, read_config
from kvatlas.route.request import RouteRequest
from kvatlas.serve.routing.dispatch import Dispatcher
from kvatlas.serve.routing.metrics import RoutingMetrics
from kvatlas.serve.routing.spans import PATH_MAX
from kvatlas.tokens.tokenization import Tokenization

PATH = "/v1/completions"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PRIVATE = "the launch code is 0000 "
STEPS = ["read", "tokens", "admission", "decide"]


class Gate:
    """Admission that can be shut."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.reached = asyncio.Event()

    async def admit(self, _request: RouteRequest, _body_bytes: int) -> None:
        self.reached.set()
        await self.open.wait()

    def changed(self) -> None:
        pass


class Traced:
    """A dispatcher whose spans are kept."""

    def __init__(self, *urls: str, traced: bool = True) -> None:
        self.memory = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.memory))
        self.router = build_router(read_config(""), random=random.Random(0))
        self.router.set_endpoints(pool_from_urls(urls).endpoints)
        self.gate = Gate()
        self.dispatcher = Dispatcher(
            self.router,
            Tokenization([], Metrics()),
            self.gate,
            RoutingMetrics(CollectorRegistry()),
            traces=Traces(provider) if traced else None,
        )

    @property
    def span(self) -> ReadableSpan:
        (span,) = self.memory.get_finished_spans()
        return span


def body(prompt: str = PRIVATE * 40) -> bytes:
    return msgspec.json.encode({"model": "llama", "prompt": prompt})


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_span_tells_each_step_where_the_request_went_and_how_it_ended() -> None:
    one = Traced("http://10.0.0.1:8000")
    trip = await one.dispatcher.dispatch(PATH, {"x-request-id": "r1"}, body())
    trip.first_token(0.2)
    assert not one.memory.get_finished_spans()
    done = Outcome(end=End.DONE, ttft_s=0.2, duration_s=0.5, prompt_tokens=240, cached_tokens=64, output_tokens=9)
    trip.finished(done)
    trip.finished(done)
    span = one.span
    assert (span.name, span.kind, span.parent) == ("kvatlas.route", SpanKind.SERVER, None)
    assert [event.name for event in span.events] == [*STEPS, "first token"]
    assert told(span) == {
        "url.path": PATH,
        "gen_ai.request.model": "llama",
        "gen_ai.usage.input_tokens": 240,
        "gen_ai.usage.output_tokens": 9,
        "server.address": "10.0.0.1",
        "server.port": 8000,
        "kvatlas.request_id": "r1",
        "kvatlas.endpoint": trip.decision.target.name,
        "kvatlas.prompt_tokens": trip.decision.request.prompt_tokens,
        "kvatlas.matched_tokens": 0,
        "kvatlas.matched_by": "none",
        "kvatlas.predicted_cached_tokens": 0,
        "kvatlas.cached_tokens": 64,
        "kvatlas.ttft_s": 0.2,
        "kvatlas.why": f"{trip.decision.target.name} was the only candidate",
        "kvatlas.end": "done",
        "kvatlas.retries": 0,
    }
    assert span.status.status_code is StatusCode.UNSET


async def test_a_span_holds_nothing_of_the_prompt() -> None:
    one = Traced("http://10.0.0.1:8000", "http://10.0.0.2:8000")
    (await one.dispatcher.dispatch(PATH, {}, body())).finished(Outcome(end=End.DONE))
    assert "launch" not in one.span.to_json()
    with pytest.raises(RequestError):
        await one.dispatcher.dispatch(PATH, {}, body()[:-20])
    assert "launch" not in one.memory.get_finished_spans()[-1].to_json()


async def test_the_engine_is_told_of_the_span_and_the_clients_is_its_parent() -> None:
    one = Traced("http://10.0.0.1:8000")
    trip = await one.dispatcher.dispatch(PATH, {"traceparent": CALLER, "tracestate": "vendor=1"}, body())
    sent = trip.request_headers()
    trip.finished(Outcome(end=End.DONE))
    assert one.span.parent is not None
    assert f"{one.span.parent.span_id:016x}" == CALLER[36:52]
    assert sent["traceparent"] == f"{CALLER[:36]}{one.span.context.span_id:016x}-01"
    assert sent["tracestate"] == "vendor=1"


async def test_a_tracestate_without_a_valid_traceparent_does_not_go_on() -> None:
    one = Traced("http://10.0.0.1:8000")
    trip = await one.dispatcher.dispatch(PATH, {"traceparent": "zz", "tracestate": "vendor=1"}, body())
    assert trip.request_headers()["tracestate"] == ""
    trip.finished(Outcome(end=End.CLIENT_GONE))
    assert one.span.parent is None


async def test_of_a_request_that_its_caller_does_not_trace_only_the_context_goes_on() -> None:
    one = Traced("http://10.0.0.1:8000")
    trip = await one.dispatcher.dispatch(PATH, {"traceparent": f"{CALLER[:-2]}00", "tracestate": "vendor=1"}, body())
    sent = trip.request_headers()
    trip.finished(Outcome(end=End.DONE))
    assert sent["traceparent"].startswith(CALLER[:36])
    assert (sent["traceparent"][-3:], sent["tracestate"]) == ("-00", "vendor=1")
    assert not one.memory.get_finished_spans()


async def test_without_traces_headers_of_the_client_are_left_as_they_are() -> None:
    one = Traced("http://10.0.0.1:8000", traced=False)
    trip = await one.dispatcher.dispatch(PATH, {"traceparent": CALLER}, body())
    assert "traceparent" not in trip.request_headers()
    trip.finished(Outcome(end=End.DONE))
    assert not one.memory.get_finished_spans()


async def test_a_retry_and_a_failure_of_the_engine_are_told() -> None:
    one = Traced("http://10.0.0.1:8000", "http://10.0.0.2:8000")
    trip = await one.dispatcher.dispatch(PATH, {}, body())
    (other,) = (endpoint for endpoint in one.router.endpoints if endpoint.name != trip.decision.target.name)
    trip.moved(other)
    trip.finished(Outcome(end=End.UNREACHABLE))
    span = one.span
    assert [event.name for event in span.events] == [*STEPS, "retry"]
    assert told(span)["kvatlas.endpoint"] == other.name
    assert (told(span)["kvatlas.retries"], told(span)["kvatlas.end"]) == (1, "unreachable")
    assert span.status.status_code is StatusCode.ERROR


async def test_a_request_that_goes_nowhere_says_why() -> None:
    one = Traced()
    with pytest.raises(NoEndpointError):
        await one.dispatcher.dispatch(PATH, {}, body())
    with pytest.raises(NoEndpointError):
        one.dispatcher.dispatch_bare("/" + "x" * 1000, {})
    for span in one.memory.get_finished_spans():
        assert told(span)["kvatlas.dropped_reason"] == "rejected-no-endpoints"
        assert (told(span)["error.type"], told(span)["kvatlas.end"]) == ("NoEndpointError", "not_sent")
        assert span.status.status_code is StatusCode.ERROR
        assert len(told(span)["url.path"]) <= PATH_MAX


async def test_a_client_that_leaves_while_its_request_waits_ends_the_span() -> None:
    one = Traced("http://10.0.0.1:8000")
    one.gate.open.clear()
    asking = asyncio.create_task(one.dispatcher.dispatch(PATH, {}, body()))
    await one.gate.reached.wait()
    asking.cancel()
    await asyncio.wait({asking})
    assert told(one.span)["kvatlas.end"] == "client_gone"
    assert [event.name for event in one.span.events] == ["read", "tokens"]


async def test_a_request_without_a_body_has_a_span_too() -> None:
    one = Traced("http://10.0.0.1:8000")
    one.dispatcher.dispatch_bare("/v1/models", {}).finished(Outcome(end=End.DONE))
    assert told(one.span)["url.path"] == "/v1/models"
