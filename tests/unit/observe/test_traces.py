"""Traces: when they are on, whose children spans are, and that they reach a collector."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvatlas.observe.traces import Traces, exporters_wanted, traces_from
from tests.models.collector import collector

COLLECTOR = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, ()),
        ({"OTEL_TRACES_EXPORTER": "none", **COLLECTOR}, ()),
        ({"OTEL_SDK_DISABLED": "True", **COLLECTOR}, ()),
        (COLLECTOR, ("otlp_proto_http",)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/v1/traces"}, ("otlp_proto_http",)),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ("otlp_proto_http",)),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ("otlp_proto_grpc",)),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, ("console", "otlp_proto_http")),
    ],
)
def test_the_environment_says_whether_and_how_spans_are_exported(environ: Mapping[str, str], wanted: tuple[str, ...]) -> None:
    assert exporters_wanted(environ) == wanted


@pytest.mark.parametrize("name", ["zipkin", "otlp"])
def test_an_exporter_that_is_missing_leaves_traces_off(name: str) -> None:
    assert traces_from({"OTEL_TRACES_EXPORTER": name, "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier/pigeon"}) is None


def test_nothing_is_set_up_where_nobody_asks() -> None:
    assert traces_from({}) is None


def test_a_span_is_a_child_of_the_callers_and_hands_its_own_context_on() -> None:
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    traces = Traces(provider)
    span = traces.begin("route", {"traceparent": CALLER, "tracestate": "vendor=1"})
    sent_on = traces.context_of(span)
    span.end()
    (ended,) = memory.get_finished_spans()
    assert ended.parent is not None
    assert f"{ended.parent.trace_id:032x}-{ended.parent.span_id:016x}" in CALLER
    assert sent_on == {"traceparent": f"00-{CALLER[3:35]}-{ended.context.span_id:016x}-01", "tracestate": "vendor=1"}


def test_a_caller_that_does_not_sample_is_followed() -> None:
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    traces = Traces(provider)
    span = traces.begin("route", {"traceparent": f"{CALLER[:-2]}00"})
    span.end()
    assert not memory.get_finished_spans()
    assert traces.context_of(span)["traceparent"].endswith("-00")


async def test_spans_reach_an_otlp_collector_when_the_service_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    async with collector() as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{url}/v1/traces")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "none")
        monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
        monkeypatch.delenv("OTEL_RESOURCE_ATTRIBUTES", raising=False)
        traces = traces_from(os.environ)
        assert traces is not None
        traces.begin("route", {}).end()
        await asyncio.to_thread(traces.close)
        await asyncio.to_thread(traces.close)
    (request,) = received
    (sent,) = request.resource_spans
    attributes = {one.key: one.value.string_value for one in sent.resource.attributes}
    assert attributes["service.name"] == "kvatlas"
    assert [span.name for scope in sent.scope_spans for span in scope.spans] == ["route"]
