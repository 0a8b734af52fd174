"""What engines tell along with answers, and what they are told of traces, through a real proxy."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvatlas.observe.traces import Traces
from kvatlas.serve.routing.dispatch import RoutingBounds
from kvatlas.sim.live.faults import Fault
from tests.integration.proxying import COMPLETION, proxy
from tests.models.embedded import engine

pytestmark = pytest.mark.usefixtures("each_stack")

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
FORMAT = "endpoint-load-metrics-format"
LOAD = "endpoint-load-metrics"


def tracing() -> tuple[Traces, InMemorySpanExporter]:
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return Traces(provider), memory


async def test_engines_are_asked_for_their_load_and_the_answer_is_kept_from_the_client() -> None:
    async with engine() as one, proxy(one, bounds=RoutingBounds(orca=True)) as px:
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            assert answer.status == 200
            assert LOAD not in answer.headers
        assert one.requests[-1].headers[FORMAT] == "JSON"
        await px.until_finished(1)
        (endpoint,) = px.router.endpoints
        report = px.router.load(endpoint.name).report
        assert report is not None
        assert report.waiting == 0


async def test_a_client_that_asks_for_load_gets_it_and_the_router_learns_it_too() -> None:
    async with engine() as one, proxy(one) as px:
        async with px.client.post("/v1/completions", json=COMPLETION, headers={FORMAT: "json"}) as answer:
            assert answer.headers[LOAD].startswith("JSON ")
        assert [value for name, value in one.requests[-1].raw_headers if name.lower() == FORMAT.encode()] == [b"json"]
        await px.until_finished(1)
        (endpoint,) = px.router.endpoints
        assert px.router.load(endpoint.name).report is not None


async def test_engines_are_not_asked_by_default() -> None:
    async with engine() as one, proxy(one) as px:
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            assert answer.status == 200
        assert FORMAT not in one.requests[-1].headers
        await px.until_finished(1)
        assert px.router.load(px.router.endpoints[0].name).report is None


async def test_after_a_retry_the_load_is_that_of_who_answered() -> None:
    async with engine() as one, engine() as two, proxy(one, two, bounds=RoutingBounds(orca=True)) as px:
        one.fail(Fault("status", status=503))
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            assert answer.status == 200
        await px.until_finished(1)
        first, second = px.router.endpoints
        assert px.router.load(first.name).report is None
        assert px.router.load(second.name).report is not None


async def test_the_engine_gets_the_routers_trace_context_once_in_place_of_the_clients() -> None:
    traces, memory = tracing()
    async with engine() as one, proxy(one, traces=traces) as px:
        headers = {"traceparent": CALLER, "tracestate": "vendor=1"}
        async with px.client.post("/v1/completions", json=COMPLETION, headers=headers) as answer:
            assert answer.status == 200
        await px.until_finished(1)
        (span,) = memory.get_finished_spans()
        sent = [value.decode() for name, value in one.requests[-1].raw_headers if name.lower() == b"traceparent"]
    assert sent == [f"{CALLER[:36]}{span.context.span_id:016x}-01"]
    assert one.requests[-1].headers["tracestate"] == "vendor=1"
    assert (span.attributes or {})["kvatlas.end"] == "done"
    assert [event.name for event in span.events][-1] == "first token"


async def test_without_traces_the_clients_context_passes_as_it_is() -> None:
    async with engine() as one, proxy(one) as px:
        async with px.client.post("/v1/completions", json=COMPLETION, headers={"traceparent": CALLER}) as answer:
            assert answer.status == 200
        assert one.requests[-1].headers["traceparent"] == CALLER
