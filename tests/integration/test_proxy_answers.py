"""The proxy before real engines: what passes it, in both directions, and when."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from kvatlas.route.outcome import End
from tests.integration.proxying import CHAT, COMPLETION, endpoint_of, proxy
from tests.models.embedded import engine
from tests.models.odd_server import TEXT, OddServer, long_text, odd_server

pytestmark = pytest.mark.usefixtures("each_stack")

TIMEOUT_S = 20


async def test_each_event_reaches_the_client_before_the_engine_sends_the_next() -> None:
    async with engine() as one, proxy(one) as px:
        async with px.client.post("/v1/chat/completions", json=CHAT) as answer:
            said = (await answer.json())["choices"][0]["message"]["content"].split()
        one.stall(after=0)
        async with px.client.post("/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            assert answer.status == 200
            for i in range(CHAT["max_tokens"]):
                one.stall(after=i + 1)
                if i == 0:
                    await asyncio.wait_for(answer.content.readuntil(b"\n\n"), TIMEOUT_S)  # who speaks
                event = await asyncio.wait_for(answer.content.readuntil(b"\n\n"), TIMEOUT_S)
                assert json.loads(event[6:])["choices"][0]["delta"]["content"] == f" {said[i]}"
            one.fail()
            assert await answer.content.read() == b"data: [DONE]\n\n"
        assert len(said) == CHAT["max_tokens"]
        await px.until_finished(2)
        assert [(where, outcome.end) for where, outcome in px.outcomes] == [("e0", End.DONE)] * 2
        assert px.outcomes[1][1].ttft_s is not None


async def test_pieces_of_an_answer_that_is_no_stream_are_passed_as_they_come() -> None:
    async with engine() as one, proxy(one) as px:
        one.stall(after=1)
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            first = await asyncio.wait_for(answer.content.readany(), TIMEOUT_S)
            one.fail()
            body = first + await answer.content.read()
        assert len(first) < len(body) == answer.content_length
        assert len(json.loads(body)["choices"][0]["text"].split()) == COMPLETION["max_tokens"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", CHAT),
        ("/tokenize", {"model": "tiny", "prompt": "one two"}),
    ],
)
async def test_bodies_pass_unchanged(path: str, body: dict[str, object]) -> None:
    sent = json.dumps(body, indent=3).encode()
    async with engine() as one, proxy(one) as px:
        async with px.client.post(path, data=sent, headers={"content-type": "application/json; charset=utf-8"}) as answer:
            assert answer.status == 200
            through = await answer.read()
        assert one.requests[-1].body == sent
        assert one.requests[-1].path == path
        assert json.loads(through)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings"])
async def test_bodies_that_embedded_engines_do_not_take_pass_unchanged(path: str) -> None:
    async def told(_one: OddServer, request: web.Request) -> web.Response:
        return web.json_response({"path": request.path})

    sent = json.dumps({"model": "tiny", "input": ["one", "two"]}, indent=3).encode()
    async with odd_server(told) as one, proxy(one) as px:
        async with px.client.post(path, data=sent, headers={"content-type": "application/json; charset=utf-8"}) as answer:
            assert (answer.status, await answer.json()) == (200, {"path": path})
        assert one.bodies == [sent]


async def test_what_the_engine_counted_is_told_to_the_router() -> None:
    body = {"model": "tiny", "prompt": list(range(64)), "max_tokens": 3}
    async with engine() as one, proxy(one) as px:
        for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
            async with px.client.post("/v1/completions", json={**body, **more}) as answer:
                await answer.read()
        await px.until_finished(2)
        told = [(o.prompt_tokens, o.cached_tokens, o.output_tokens) for _, o in px.outcomes]
        assert told == [(64, 0, 3), (64, 48, 3)]


async def test_large_bodies_pass_in_both_directions() -> None:
    prompt = "word " * 2_000_000
    async with odd_server(long_text) as one, proxy(one) as px:
        sent = json.dumps({"model": "tiny", "prompt": prompt}).encode()
        async with px.client.post("/v1/completions", data=sent, headers={"content-type": "application/json"}) as answer:
            assert (await answer.json())["choices"][0]["text"] == TEXT
        assert one.bodies == [sent]


async def test_answers_of_engines_that_refuse_pass_with_their_status() -> None:
    async with engine() as one, proxy(one) as px:
        async with px.client.post("/v1/completions", json={"model": "tiny", "prompt": [[]], "max_tokens": "x"}) as answer:
            assert answer.status == 400
            assert "error" in await answer.json()
        await px.until_finished(1)
        assert px.outcomes[0][1].end is End.REFUSED


async def test_connections_to_engines_are_used_again() -> None:
    async with engine() as one, proxy(one) as px:
        for _ in range(5):
            async with px.client.post("/v1/completions", json=COMPLETION) as answer:
                await answer.read()
        assert one.connections == 1


# -- headers ------------------------------------------------------------------------------------------------------------


async def test_request_ids_are_made_and_given_ones_are_kept() -> None:
    async with engine() as one, proxy(one) as px:
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            made = answer.headers["x-request-id"]
        assert one.requests[-1].headers["x-request-id"] == made
        async with px.client.post("/v1/completions", json=COMPLETION, headers={"X-Request-Id": "mine"}) as answer:
            assert answer.headers.getall("x-request-id") == ["mine"]
        assert one.requests[-1].headers["x-request-id"] == "mine"
        async with px.client.post("/v1/completions", data=b"{", headers={"x-request-id": "bad"}) as answer:
            assert answer.headers["x-request-id"] == "bad"


async def test_routing_headers_of_clients_are_not_passed_on() -> None:
    own = {
        "X-Gateway-Destination-Endpoint": "10.0.0.9:1",
        "x-prefiller-host-port": "10.0.0.9:1",
        "X-Data-Parallel-Rank": "7",
        "x-kvatlas-explain": "0",
        "connection": "x-secret, keep-alive",
        "x-secret": "1",
        "x-forwarded-for": "10.1.1.1",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    async with engine() as one, proxy(one) as px:
        async with px.client.post("/v1/completions", json=COMPLETION, headers=own) as answer:
            assert answer.status == 200
        seen = one.requests[-1].headers
    assert not seen.keys() & {
        *("x-gateway-destination-endpoint", "x-prefiller-host-port", "x-data-parallel-rank", "x-kvatlas-explain"),
        *("x-secret", "connection"),
    }
    assert seen["host"] == one.authority
    assert seen["x-forwarded-for"] == "10.1.1.1, 127.0.0.1"
    assert seen["x-forwarded-proto"] == "http"
    assert seen["traceparent"] == own["traceparent"]


async def test_engines_are_told_their_rank_and_who_prefills() -> None:
    async with engine() as one, engine() as two, proxy(one, prefill="e1") as px:
        px.route_to(endpoint_of(one, "e0", names_rank=True, dp_rank=3), endpoint_of(two, "e1"))
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            assert answer.status == 200
        seen = one.requests[-1].headers
    assert seen["x-data-parallel-rank"] == "3"
    assert seen["x-prefiller-host-port"] == two.authority


async def test_where_a_request_went_is_told_on_demand_only() -> None:
    async with engine() as one, proxy(one, matched_tokens={"e0": 32}) as px:
        async with px.client.post("/v1/completions", json=COMPLETION, headers={"x-kvatlas-explain": "1"}) as answer:
            told = {name.lower(): value for name, value in answer.headers.items() if name.lower().startswith("x-kvatlas")}
        assert told == {
            "x-kvatlas-endpoint": "e0",
            "x-kvatlas-matched-tokens": "32",
            "x-kvatlas-matched-by": "events",
        }
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            assert not [name for name in answer.headers if name.lower().startswith("x-kvatlas")]


async def test_engines_get_their_own_token_or_that_of_the_client() -> None:
    async with engine() as one:
        for settings, expected in (
            ({}, "Bearer client"),
            ({"engine_token": "engines"}, "Bearer engines"),
            ({"token": "client"}, None),
            ({"token": "client", "engine_token": "engines"}, "Bearer engines"),
        ):
            async with proxy(one, settings=settings) as px:
                headers = {"authorization": "Bearer client"}
                async with px.client.post("/v1/completions", json=COMPLETION, headers=headers) as answer:
                    assert answer.status == 200
            assert one.requests[-1].headers.get("authorization") == expected


# -- other paths --------------------------------------------------------------------------------------------------------


async def test_models_of_all_engines_are_listed_once() -> None:
    async with engine(model="a") as one, engine(model="b") as two, engine(model="a") as three, proxy(one, two, three) as px:
        for _ in range(3):
            async with px.client.get("/v1/models") as answer:
                assert {model["id"] for model in (await answer.json())["data"]} == {"a", "b"}
        assert len(one.requests) == 1
        async with px.client.get("/v1/models/b") as answer:
            assert (await answer.json())["id"] == "b"
        async with px.client.get("/v1/models/c") as answer:
            assert answer.status == 404


async def test_models_are_listed_while_an_engine_is_away() -> None:
    async with engine(model="a") as one, engine(model="b") as two, proxy(one, two) as px:
        await one.refuse()
        async with px.client.get("/v1/models") as answer:
            assert [model["id"] for model in (await answer.json())["data"]] == ["b"]
        await two.refuse()
        async with px.client.get("/v1/models", headers={"authorization": "Bearer other"}) as answer:
            assert answer.status == 503


async def test_unknown_paths_and_methods_are_refused_with_a_hint() -> None:
    async with engine() as one, proxy(one) as px:
        async with px.client.get("/v1/nothing") as answer:
            assert answer.status == 404
            assert "/v1/chat/completions" in (await answer.json())["error"]["message"]
        async with px.client.get("/v1/completions") as answer:
            assert answer.status == 405
        async with px.client.post("/v1/models") as answer:
            assert answer.status == 405
        assert not one.requests


async def test_readiness_follows_who_is_in_rotation() -> None:
    async with engine() as one, proxy(one) as px:
        async with px.client.get("/readyz") as answer:
            assert answer.status == 200
        px.route_to()
        async with px.client.get("/readyz") as answer:
            assert answer.status == 503
        async with px.client.get("/healthz") as answer:
            assert answer.status == 200
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            assert answer.status == 503
            assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
