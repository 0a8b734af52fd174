"""The HTTP API on a real server: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI

from kvatlas.config import load_config
from kvatlas.indexer import Indexer
from kvatlas.serve.http import build_app
from kvatlas.serve.service import Addresses
from kvatlas.tokens.setup import make_tokenization
from tests.integration.running import BLOCK, MODEL, PROMPT, client, filled, running

QUERY = {"model": MODEL, "token_ids": PROMPT}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service() -> AsyncIterator[Addresses]:
    async with running("api.bodyBytesMax=256KiB", "api.tokensMax=20000", "api.keysMax=100") as addresses:
        await filled(addresses)
        yield addresses


@pytest_asyncio.fixture(loop_scope="module")
async def http(service: Addresses) -> AsyncIterator[httpx.AsyncClient]:
    async with client(service) as opened:
        yield opened


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def raw(addresses: Addresses, request: bytes, *, half_close: bool = False) -> bytes:
    """Send bytes as they are and return all that comes back."""
    host, _, port = addresses.http.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    if half_close:
        writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return answer


# -- answers --------------------------------------------------------------------------------------------------------------


async def test_score_puts_the_pod_with_the_longest_prefix_first(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/score", json=QUERY)).json()
    assert [pod["pod"] for pod in answer["pods"]] == ["pod-a", "pod-b"]
    best, second = answer["pods"]
    assert (best["matched_blocks"], best["score"], best["tiers"]) == (5, 5.0, {"gpu": 5})
    assert (second["matched_blocks"], second["matched_tokens"]) == (2, 32)
    assert best["predicted_cached_tokens"] == 4 * BLOCK  # the last token is always computed
    assert answer["coverage"] == 1.0
    assert (answer["blocks"], answer["prompt_tokens"], answer["scorer"]) == (5, 80, "longest-prefix")


async def test_score_looks_at_named_pods_only(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/score", json={**QUERY, "pods": ["pod-b", "nobody"]})).json()
    assert [pod["pod"] for pod in answer["pods"]] == ["pod-b"]


async def test_candidates_are_holders_only_and_can_be_limited(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/candidates", json={**QUERY, "limit": 1})).json()
    assert [pod["pod"] for pod in answer["pods"]] == ["pod-a"]
    other = (await http.post("/v1/candidates", json={**QUERY, "model": "another"})).json()
    assert other == {"pods": [], "tokens": None}


async def test_locality_answers_the_same_by_tokens_keys_and_url(http: httpx.AsyncClient) -> None:
    by_tokens = (await http.post("/v1/locality", json=QUERY)).json()
    assert by_tokens["block_size_tokens"] == BLOCK
    assert [len(block["holders"]) for block in by_tokens["blocks"]] == [2, 2, 1, 1, 1]
    keys = [block["key"] for block in by_tokens["blocks"]]
    assert all(re.fullmatch("0x[0-9a-f]{16}", key) for key in keys)
    forms = [keys[0], str(int(keys[1], 16)), int(keys[2], 16), keys[3].upper().replace("X", "x"), keys[4]]
    assert (await http.post("/v1/locality", json={"keys": forms})).json() == by_tokens
    by_url = await http.get("/v1/locality", params={"keys": ",".join(keys)})
    assert by_url.json() == by_tokens
    tokens = ",".join(map(str, PROMPT))
    assert (await http.get("/v1/locality", params={"token_ids": tokens, "model": MODEL})).json() == by_tokens
    only_b = (await http.get("/v1/locality", params={"keys": keys[0], "pods": "pod-b"})).json()
    assert [holder["pod"] for holder in only_b["blocks"][0]["holders"]] == ["pod-b"]


async def test_keys_survive_a_reader_whose_numbers_are_doubles(http: httpx.AsyncClient) -> None:
    def as_javascript(number: str) -> float:
        return float(number)

    answer = await http.post("/v1/locality", json=QUERY)
    assert json.loads(answer.text, parse_int=as_javascript)["blocks"][0]["key"] == answer.json()["blocks"][0]["key"]


async def test_pods_shows_every_stream(http: httpx.AsyncClient) -> None:
    pods = (await http.get("/v1/pods")).json()["pods"]
    assert [(pod["pod"], pod["state"], pod["blocks"], pod["next_seq"]) for pod in pods] == [
        ("pod-a", "fresh", 5, 1),
        ("pod-b", "fresh", 2, 1),
    ]


async def test_health_readiness_and_metrics_answer(http: httpx.AsyncClient) -> None:
    assert (await http.get("/healthz")).json() == {"status": "ok"}
    assert (await http.get("/readyz")).json() == {"status": "ready"}
    await http.post("/v1/score", json=QUERY)
    await http.get("/wp-admin/setup.php")
    text = (await http.get("/metrics")).text
    assert "\nkv_cache_blocks_total 5.0\n" in text
    assert "\nkv_cache_pods_tracked 2.0\n" in text
    assert 'kv_cache_events_received_total{pod="pod-a",type="BlockStored"} 1.0' in text
    assert 'kv_cache_http_requests_total{method="POST",route="/v1/score",status="200"}' in text
    assert 'route="unmatched",status="404"' in text
    assert "wp-admin" not in text


async def test_a_prompt_shorter_than_a_block_has_no_blocks(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/score", json={"model": MODEL, "token_ids": []})).json()
    assert (answer["blocks"], answer["cache_hits"], answer["coverage"]) == (0, 0, 0.0)


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, "body"),
        (b"{", 400, "body"),
        (b"not json", 400, "body"),
        (b'{"model": "m", "token_ids": [1]} trailing', 400, "body"),
        (b'{"model": "m", "token_ids": [NaN]}', 400, "body"),
        (b'{"model": "\xff\xfe", "token_ids": [1]}', 400, "body"),
        (b'{"model": "\\ud800", "token_ids": [1]}', 400, "body"),
        (b"null", 422, "body"),
        (b"[]", 422, "body"),
        (b"[" * 100_000, 422, "body"),
        (b'{"a":' * 40_000, 422, "a"),
        (b'{"model": "m", "token_ids": ' + b"[" * 100_000, 422, "token_ids[0]"),
        (b'{"model": "m", "token_ids": [1, -1]}', 422, "token_ids[1]"),
        (b'{"model": "m", "token_ids": [4294967296]}', 422, "token_ids[0]"),
        (b'{"model": "m", "token_ids": [1.5]}', 422, "token_ids[0]"),
        (b'{"model": "m", "token_ids": [1e999]}', 422, "token_ids[0]"),
        (b'{"model": "m", "token_ids": [true]}', 422, "token_ids[0]"),
        (b'{"model": "m", "token_ids": ["1"]}', 422, "token_ids[0]"),
        (b'{"model": "m", "token_ids": [' + b"9" * 5000 + b"]}", 422, "token_ids[0]"),
        (b'{"model": "m", "token_ids": "1,2"}', 422, "token_ids"),
        (b'{"model": "m"}', 422, "token_ids"),
        (b'{"token_ids": [1]}', 422, "model"),
        (b'{"model": "", "token_ids": [1]}', 422, "model"),
        (b'{"model": 1, "token_ids": [1]}', 422, "model"),
        (b'{"model": "m", "token_ids": [1], "modle": "x"}', 422, "modle"),
        (b'{"model": "m", "token_ids": [1], "__class__": "x"}', 422, "__class__"),
        (b'{"model": "m", "token_ids": [1], "scorer": "nobody"}', 422, "scorer"),
        (
            b'{"model": "m", "token_ids": [1], "multimodal": [{"hash": "a", "offset_tokens": 5}]}',
            422,
            "multimodal[0].offset_tokens",
        ),
        (b'{"model": "m", "token_ids": [1], "multimodal": [{"hash": "a", "at": 5}]}', 422, "multimodal[0].at"),
        (b'{"model": "m", "token_ids": [1], "text": "x"}', 422, "text"),
        (b'{"model": "m", "text": "Hello"}', 501, "text"),
    ],
)
async def test_a_bad_body_is_refused_by_field_with_what_to_do(
    http: httpx.AsyncClient, body: bytes, status: int, field: str
) -> None:
    answer = await http.post("/v1/score", content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["field"] == field
    assert error["problem"]
    assert error["remedy"]


@pytest.mark.parametrize(
    "key", ["", "0x", "0x1_0", "12_3", "-1", "zz", "ff", "0x10000000000000000", "٣", "1" * 30, -1, 1 << 64]
)
async def test_what_is_no_block_key_is_refused_by_position(http: httpx.AsyncClient, key: str | int) -> None:
    answer = await http.post("/v1/locality", json={"keys": ["0x1", key]})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "keys[1]"


async def test_locality_needs_keys_or_a_prompt_and_not_both(http: httpx.AsyncClient) -> None:
    for body in ({}, {"keys": [1], "token_ids": [1], "model": "m"}, {"keys": [1], "text": "x"}):
        assert (await http.post("/v1/locality", json=body)).json()["error"]["field"] == "keys"
    assert (await http.post("/v1/locality", json={"token_ids": [1]})).json()["error"]["field"] == "model"
    assert (await http.get("/v1/locality")).json()["error"]["field"] == "keys"
    assert (await http.get("/v1/locality", params={"text": "Hello", "model": "m"})).status_code == 501


@pytest.mark.parametrize("path", ["/v1/locality?kesy=1", "/v1/pods?all=1"])
async def test_an_unknown_url_parameter_is_refused_by_name(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(path)
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] in ("kesy", "all")


async def test_more_tokens_or_keys_than_allowed_are_refused(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/score", json={"model": "m", "token_ids": [7] * 20_001})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "token_ids")
    assert "api.tokensMax" in answer.json()["error"]["problem"]
    answer = await http.post("/v1/locality", json={"keys": [7] * 101})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "keys")


async def test_a_body_that_declares_too_much_is_refused_before_it_is_sent(service: Addresses) -> None:
    answer = await raw(service, b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"api.bodyBytesMax (262144 bytes)" in answer


async def test_an_endless_body_is_cut_off_at_the_limit(service: Addresses) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100 << 20:
            sent += 1 << 14
            yield b" " * (1 << 14)

    async with client(service) as http:
        # The answer may be lost when the connection is cut while the client still sends.
        with contextlib.suppress(httpx.HTTPError):
            assert (await http.post("/v1/score", content=endless())).status_code == 413
    assert sent < 20 << 20


async def test_wrong_paths_and_methods_are_answered_in_the_same_form(http: httpx.AsyncClient) -> None:
    for method, path, status in (("GET", "/v2/score", 404), ("GET", "/v1/score", 405), ("DELETE", "/v1/pods", 405)):
        answer = await http.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"field", "problem", "remedy"}


async def test_a_client_that_goes_away_in_the_middle_leaves_the_service_well(service: Addresses) -> None:
    host, _, port = service.http.removeprefix("http://").rpartition(":")
    for _ in range(20):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        await writer.drain()
        writer.transport.abort()
    async with client(service) as http:
        assert (await http.post("/v1/score", json=QUERY)).status_code == 200
        for _ in range(100):
            if 'status="499"} 20.0' in (await http.get("/metrics")).text:
                return
            await asyncio.sleep(0.02)
    raise AssertionError("the requests given up were not counted")


async def test_what_is_no_http_is_refused(service: Addresses) -> None:
    assert (await raw(service, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    # More than 64 KiB of headers: the connection may be cut before the answer is read.
    with contextlib.suppress(ConnectionError):
        assert (await raw(service, b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 400 ")


# -- limits ---------------------------------------------------------------------------------------------------------------


async def test_a_request_beyond_the_concurrency_limit_is_told_to_come_back() -> None:
    async with running("api.concurrencyMax=2") as addresses, client(addresses) as http:
        release = asyncio.Event()

        async def slow_body() -> AsyncIterator[bytes]:
            yield b'{"model": "m", '
            await release.wait()
            yield b'"token_ids": [1]}'

        slow = [asyncio.create_task(http.post("/v1/score", content=slow_body())) for _ in range(2)]
        for _ in range(200):
            if "\nkv_cache_queries_in_progress 2.0\n" in (await http.get("/metrics")).text:
                break
            await asyncio.sleep(0.01)
        refused = await http.get("/v1/pods")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200
        release.set()
        assert [(await task).status_code for task in slow] == [200, 200]
        assert (await http.get("/v1/pods")).status_code == 200


async def test_a_slow_body_and_slow_headers_are_given_up() -> None:
    async with running("api.requestTimeout=300ms") as addresses:
        body = raw(addresses, b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        headers = raw(addresses, b"POST /v1/score HTTP/1.1\r\nhost: x\r\nx-slow: ")
        silent = raw(addresses, b"")
        answers = await asyncio.gather(body, headers, silent)
        assert answers[0].startswith(b"HTTP/1.1 408 ")
        assert answers[1:] == [b"", b""]


async def test_slow_headers_are_given_up_on_a_connection_that_was_used_before() -> None:
    async with running("api.requestTimeout=300ms") as addresses:
        host, _, port = addresses.http.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await reader.readuntil(b"}") != b""
        writer.write(b"GET /heal")
        began = time.monotonic()
        assert await asyncio.wait_for(reader.read(), 20) == b""
        assert time.monotonic() - began < 4  # sooner than the 5 s that an idle connection is kept
        writer.close()


async def test_connections_beyond_the_limit_are_turned_away() -> None:
    async with running("api.connectionsMax=3") as addresses:
        host, _, port = addresses.http.removeprefix("http://").rpartition(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert (await raw(addresses, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")).startswith(b"HTTP/1.1 503 ")
        for _, writer in held:
            writer.close()


# -- token ----------------------------------------------------------------------------------------------------------------


async def test_with_a_token_set_only_health_checks_pass_without_it() -> None:
    async with running("api.token=s3cret") as addresses, client(addresses) as http:
        for path in ("/v1/pods", "/metrics", "/v1/locality?keys=1", "/nowhere"):
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "Basic s3cret"},
                {"authorization": "s3cret"},
            ):
                answer = await http.get(path, headers=headers)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert answer.json()["error"]["field"] == "authorization"
            allowed = await http.get(path, headers={"authorization": "bearer s3cret"})
            assert allowed.status_code in (200, 404)
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).status_code == 200
        assert (await http.get("/v1/pods", headers={"authorization": b"Bearer \xff\xfe"})).status_code == 401


async def test_metrics_can_be_opened_to_scrapers_without_a_token() -> None:
    async with running("api.token=s3cret", "api.metricsOpen=true") as addresses, client(addresses) as http:
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.get("/v1/pods")).status_code == 401


# -- the app by itself ----------------------------------------------------------------------------------------------------


def app_of(*overrides: str) -> tuple[FastAPI, Indexer]:
    indexer = Indexer(load_config(environ={}, overrides=("zmq.bind=false", *overrides)))
    return build_app(indexer, make_tokenization(indexer.config.tokens, indexer.metrics)), indexer


async def test_before_its_sources_run_it_is_not_ready_and_says_why_to_those_who_may_ask() -> None:
    app, _ = app_of("api.token=s3cret")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        answer = await http.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "not ready"})
        answer = await http.get("/readyz", headers={"authorization": "Bearer s3cret"})
        assert "not started" in answer.json()["reason"]


async def test_the_openapi_document_is_complete_and_its_examples_are_accepted() -> None:
    tiny = Path(__file__).parents[1] / "data" / "tinymodel"
    app, indexer = app_of("api.token=s3cret", f'tokens.models={{"meta-llama/Llama-3.1-8B-Instruct": "{tiny}"}}')
    document = app.openapi()
    schemas = document["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(schemas)
    assert document["security"] == [{"bearer": []}]
    paths: dict[str, dict[str, Any]] = document["paths"]
    assert set(paths) == {
        *("/v1/locality", "/v1/score", "/v1/candidates", "/v1/pods", "/healthz", "/readyz", "/metrics"),
        *("/score_completions", "/score_chat_completions"),
    }
    header = {"authorization": "Bearer s3cret"}
    indexer.start()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=header) as http:
        for path, operations in paths.items():
            for method, operation in operations.items():
                assert operation["description"]
                assert operation["responses"]["200"]["content"]
                if "requestBody" in operation:
                    example = operation["requestBody"]["content"]["application/json"]["example"]
                    answer = await http.request(method, path, json=example)
                    expected = operation["responses"]["200"]["content"]["application/json"]["example"]
                    assert answer.status_code == 200
                    if not path.startswith("/score_"):  # whose keys are pods
                        assert set(answer.json()) - {"tokens"} == set(expected) - {"tokens"}
    indexer.close()
