"""`kvatlas route` as a whole: engines with events in front of a running service, requests through its proxy, and why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvatlas.cli.client import ServiceClient
from kvatlas.config import load_config
from kvatlas.errors import ConfigError
from kvatlas.proto.envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import HttpBody, ProcessingRequest
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub
from kvatlas.serve.routing.explain import DecisionShown
from kvatlas.serve.service import Addresses, serve
from kvatlas.sim.live.server import Started
from tests.integration.running import FREE, running
from tests.models.chats import DATA
from tests.models.collector import collector
from tests.models.embedded import embedded, engine

TINY = DATA / "tinymodel"
DOORS = ("proxy.port=0", 'route.frontDoors=["proxy"]', f"tokens.models.tiny={TINY}", "route.tokensTimeout=10s")
LONG = "You are a booking agent that knows every airline, and answers in one sentence. " * 30


@asynccontextmanager
async def fleet(count: int, *overrides: str, events: bool = True) -> AsyncIterator[tuple[Addresses, list[Started]]]:
    """Run embedded engines, and a service that routes to them. ``events``: whether it reads theirs."""
    async with AsyncExitStack() as stack:
        engines = [(await stack.enter_async_context(embedded(aliases=("alias",))))[0].started for _ in range(count)]
        followed = [
            {"endpoint": one.events, "replayEndpoint": one.replay, "pod": one.pod} for one in (engines if events else ())
        ]
        named = [f"route.endpoints={json.dumps([one.url for one in engines])}", f"zmq.engines={json.dumps(followed)}"]
        yield await stack.enter_async_context(service(*named, *overrides)), engines


@asynccontextmanager
async def service(*overrides: str) -> AsyncIterator[Addresses]:
    """Run a service, and wait until it is ready: before that requests are routed without their tokens."""
    async with running(*DOORS, *overrides) as addresses:
        async with httpx.AsyncClient(base_url=addresses.http, timeout=20) as http:
            while (await http.get("/readyz")).status_code != 200:
                pass
        yield addresses


async def chat(addresses: Addresses, question: str, request_id: str, system: str = LONG, model: str = "tiny") -> httpx.Response:
    assert addresses.proxy is not None
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    async with httpx.AsyncClient(base_url=addresses.proxy, timeout=20) as http:
        return await http.post(
            "/v1/chat/completions",
            json={"model": model, "messages": messages, "max_tokens": 4},
            headers={"x-request-id": request_id, "x-kvatlas-explain": "1"},
        )


async def decision(addresses: Addresses, request_id: str) -> DecisionShown:
    """Return a decision once its request has ended."""
    client = ServiceClient(addresses.http)
    while True:
        (found,), _ = await asyncio.to_thread(client.decisions, request_id, None, 1)
        if found.outcome.end is not None:
            return found
        await asyncio.sleep(0.01)


async def held(addresses: Addresses) -> None:
    """Wait until the index has what the engines said."""
    async with httpx.AsyncClient(base_url=addresses.http, timeout=20) as http:
        while not any(pod["blocks"] for pod in (await http.get("/v1/pods")).json()["pods"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_request_goes_where_its_prefix_is_and_the_prediction_is_what_the_engine_reports() -> None:
    async with fleet(3) as (addresses, _):
        first = await chat(addresses, "one", "r1")
        assert first.status_code == 200
        await held(addresses)
        for number in range(2, 6):
            again = await chat(addresses, f"question {number}", f"r{number}")
            assert again.headers["x-kvatlas-endpoint"] == first.headers["x-kvatlas-endpoint"]
            assert again.headers["x-kvatlas-matched-by"] == "events"
            shown = await decision(addresses, f"r{number}")
            usage = again.json()["usage"]
            assert (
                shown.predicted_cached_tokens == shown.outcome.cached_tokens == usage["prompt_tokens_details"]["cached_tokens"]
            )
            assert shown.prompt_tokens == shown.outcome.prompt_tokens == usage["prompt_tokens"]


async def test_without_events_history_says_where_a_prefix_is() -> None:
    async with fleet(3, events=False) as (addresses, _):
        first = await chat(addresses, "one", "r1")
        again = await chat(addresses, "two", "r2")
        assert again.headers["x-kvatlas-endpoint"] == first.headers["x-kvatlas-endpoint"]
        assert again.headers["x-kvatlas-matched-by"] == "history"
        shown = await decision(addresses, "r2")
        assert any("event" in note for note in shown.notes)


async def test_a_model_without_a_tokenizer_is_routed_and_says_so() -> None:
    async with fleet(2, "tokens.models={}", events=False) as (addresses, _):
        assert (await chat(addresses, "one", "r1")).status_code == 200
        shown = await decision(addresses, "r1")
        assert any("tokens were not known" in note for note in shown.notes)


async def test_another_name_of_a_model_has_its_tokenizer_and_its_events() -> None:
    async with fleet(2, "models.alias=tiny") as (addresses, _):
        for number in (1, 2):
            answer = await chat(addresses, f"question {number}", f"r{number}", model="alias")
            await held(addresses)
        assert answer.headers["x-kvatlas-matched-by"] == "events"


async def test_prompts_that_share_nothing_are_spread() -> None:
    async with fleet(3) as (addresses, _):
        answers = await asyncio.gather(*(chat(addresses, "hi", f"r{n}", system=f"{n} {LONG}") for n in range(12)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.headers["x-kvatlas-endpoint"] for answer in answers}) == 3


async def test_an_llm_d_configuration_decides_where_one_is_given(tmp_path: Any) -> None:
    file = tmp_path / "epp.yaml"
    file.write_text(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
        "plugins: [{type: precise-prefix-cache-producer}, {type: prefix-cache-scorer}, {type: queue-scorer}]\n"
        "schedulingProfiles: [{name: default, plugins: [{pluginRef: prefix-cache-scorer, weight: 3},"
        " {pluginRef: queue-scorer, weight: 1}]}]\n"
    )
    async with fleet(2, f"route.pickerConfig={file}") as (addresses, _):
        await chat(addresses, "one", "r1")
        await held(addresses)
        await chat(addresses, "two", "r2")
        (profile,) = (await decision(addresses, "r2")).profiles
        weights = {name: score.weight for name, score in profile.candidates[0].scores.items()}
        assert weights == {"prefix-cache-scorer": 3.0, "queue-scorer": 1.0}


async def test_endpoints_and_decisions_are_shown_and_odd_questions_are_refused() -> None:
    async with fleet(2) as (addresses, engines), httpx.AsyncClient(base_url=addresses.http, timeout=20) as http:
        shown = (await http.get("/v1/endpoints")).json()["endpoints"]
        assert sorted(one["address"] for one in shown) == sorted(one.url.removeprefix("http://") for one in engines)
        await chat(addresses, "one", "r1")
        await chat(addresses, "two", "r2")
        listed = (await http.get("/v1/decisions", params={"limit": 1})).json()["decisions"]
        assert [one["id"] for one in listed] == ["r2"]
        for query in ({"limit": "0"}, {"limit": "x"}, {"id": "nobody"}, {"endpoint": "nope"}, {"what": "1"}):
            answer = await http.get("/v1/decisions", params=query)
            assert (answer.status_code, answer.json()["error"]["field"]) == (422, next(iter(query)))
        metrics = (await http.get("/metrics")).text
        assert 'kvatlas_route_ends_total{end="done"' in metrics


async def test_the_endpoint_picker_goes_on_while_envoy_learns_that_it_stops() -> None:
    settings = ('route.frontDoors=["ext-proc"]', "extProc.port=0", "extProc.healthPort=0", "extProc.drainDelay=1s")
    async with fleet(1, *settings, "route.tokensTimeout=1s", events=False) as (addresses, _):
        assert addresses.ext_proc is not None
        channel = grpc.aio.insecure_channel(addresses.ext_proc)
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        process = ExternalProcessorStub(channel).Process
        answered = asyncio.create_task(first_refusal(process, health))
    assert await answered is None


async def first_refusal(process: Any, health: Any) -> str | None:
    """Ask for a decision as soon as health checks say no; return what it was refused with."""
    assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    call = process()
    head = ProcessingRequest()
    head.protocol_config.request_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    head.request_headers.headers.headers.add(key=":path", raw_value=b"/v1/completions")
    await call.write(head)
    body = b'{"model": "tiny", "prompt": "hello"}'
    await call.write(ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=True)))
    answer = await call.read()
    await call.done_writing()
    return None if answer.HasField("request_headers") else str(answer)


async def test_a_router_without_endpoints_is_told_what_to_name() -> None:
    for overrides in ((), ('route.endpoints=["http://127.0.0.1:1"]', "route.endpointsFile=fleet.yaml")):
        config = load_config(environ={}, overrides=(*FREE, *DOORS, *overrides))
        with pytest.raises(ConfigError, match=r"route\.endpoints"):
            await serve(config, stop=asyncio.Event())


async def test_requests_are_traced_to_a_collector_and_engines_join_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with collector() as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        async with engine() as seen, service(f'route.endpoints=["{seen.url}"]') as addresses:
            assert (await chat(addresses, "one", "r1")).status_code == 200
            await decision(addresses, "r1")
    scopes = [scope for request in received for sent in request.resource_spans for scope in sent.scope_spans]
    (span,) = (span for scope in scopes for span in scope.spans)
    told = {one.key: one.value for one in span.attributes}
    assert (told["kvatlas.request_id"].string_value, told["kvatlas.end"].string_value) == ("r1", "done")
    assert told["kvatlas.prompt_tokens"].int_value > 100
    (sent_on,) = (one.headers["traceparent"] for one in seen.requests if one.path == "/v1/chat/completions")
    assert sent_on.startswith(f"00-{span.trace_id.hex()}-{span.span_id.hex()}-")


async def test_what_waits_and_what_producers_keep_is_in_the_metrics() -> None:
    async with fleet(1) as (addresses, _), httpx.AsyncClient(base_url=addresses.http, timeout=20) as http:
        await chat(addresses, "one", "r1")
        metrics = (await http.get("/metrics")).text
        assert 'kvatlas_route_admissions_total{end="admitted",priority="0"} 1.0' in metrics
        assert 'kvatlas_route_history_entries{producer="blended-prefix-cache-producer"}' in metrics
        assert 'kvatlas_route_promise_seconds{producer="blended-prefix-cache-producer"}' in metrics
