"""Queries with text and chats on a running service: HTTP, llm-d's example routes, gRPC. With the tiny model's tokenizer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from kvatlas.proto.indexer.v1 import indexer_pb2, indexer_pb2_grpc
from kvatlas.proto.kvatlas.v1 import kvatlas_pb2, kvatlas_pb2_grpc
from kvatlas.serve.service import Addresses
from tests.integration.running import BLOCK, MODEL, client, publish, running, stored

TINY = Path(__file__).parents[1] / "data" / "tinymodel"
WITH_TOKENIZER = (f"tokens.models.{MODEL}={TINY}",)
TEXT = "Once upon a time there was a scheduler that knew where every prefix was. " * 8
MESSAGES = [
    {"role": "system", "content": "You are a booking agent. Be brief. " * 6},
    {"role": "user", "content": "I want to change my flight to Oslo. " * 6},
]
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
RENDERED = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in MESSAGES) + "<|im_start|>assistant\n"


def tokens_of(text: str) -> list[int]:
    return Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def whole_blocks(tokens: list[int]) -> list[int]:
    return tokens[: len(tokens) // BLOCK * BLOCK]


@pytest_asyncio.fixture
async def service() -> AsyncIterator[Addresses]:
    """pod-a holds the text, pod-b the chat, pod-c another prompt."""
    async with running(*WITH_TOKENIZER) as addresses:
        frames = [
            stored("pod-a", 0, whole_blocks(tokens_of(TEXT)), 1),
            stored("pod-b", 0, whole_blocks(tokens_of(RENDERED)), 1000),
            stored("pod-c", 0, list(range(4 * BLOCK)), 2000),
        ]
        assert (await publish(addresses, frames)).accepted == 3
        async with client(addresses) as http:
            for _ in range(200):
                pods = (await http.get("/v1/pods")).json()["pods"]
                if [pod["blocks"] > 0 for pod in pods] == [True] * 3:
                    break
                await asyncio.sleep(0.02)
        yield addresses


@pytest_asyncio.fixture
async def http(service: Addresses) -> AsyncIterator[httpx.AsyncClient]:
    async with client(service) as made:
        yield made


@pytest.mark.parametrize(
    ("prompt", "pod", "tokens"),
    [
        ({"text": TEXT}, "pod-a", tokens_of(TEXT)),
        ({"completion": {"prompt": TEXT, "max_tokens": 5, "temperature": 0.3}}, "pod-a", tokens_of(TEXT)),
        ({"completion": {"prompt": tokens_of(TEXT)}}, "pod-a", tokens_of(TEXT)),
        ({"chat": {"messages": MESSAGES, "stream": True}}, "pod-b", tokens_of(RENDERED)),
    ],
)
async def test_every_form_of_a_prompt_finds_its_holder(
    http: httpx.AsyncClient, prompt: dict[str, Any], pod: str, tokens: list[int]
) -> None:
    scored = (await http.post("/v1/score", json={"model": MODEL, **prompt})).json()
    assert (scored["pods"][0]["pod"], scored["pods"][0]["matched_tokens"]) == (pod, len(whole_blocks(tokens)))
    assert scored["prompt_tokens"] == len(tokens)
    given = (await http.post("/v1/score", json={"model": MODEL, "token_ids": tokens})).json()
    assert {**scored, "tokens": None} == given
    located = (await http.post("/v1/locality", json={"model": MODEL, **prompt})).json()
    assert [block["holders"][0]["pod"] for block in located["blocks"]] == [pod] * (len(tokens) // BLOCK)


async def test_an_answer_says_where_its_tokens_came_from(http: httpx.AsyncClient) -> None:
    first = (await http.post("/v1/score", json={"model": MODEL, "text": TEXT})).json()["tokens"]
    assert first["source"] == "local"
    assert first["tokenizer"]
    assert first["revision"].startswith("sha256:")
    assert (first["exact"], first["complete"], first["from_store"]) == (True, True, 0)
    again = (await http.post("/v1/candidates", json={"model": MODEL, "text": TEXT + "And then"})).json()["tokens"]
    assert again["source"] == "store"
    assert again["from_store"] > 100


async def test_the_policy_stored_takes_what_is_known_and_learns_the_rest(http: httpx.AsyncClient) -> None:
    asked = {"model": MODEL, "text": TEXT, "tokenize": {"policy": "stored"}}
    await http.post("/v1/score", json={"model": MODEL, "text": "loads the tokenizer"})
    unknown = (await http.post("/v1/score", json=asked)).json()
    assert (unknown["tokens"]["complete"], unknown["tokens"]["count"], unknown["pods"][0]["score"]) == (False, 0, 0)
    for _ in range(200):
        known = (await http.post("/v1/score", json=asked)).json()
        if known["tokens"]["count"]:
            break
        await asyncio.sleep(0.02)
    assert known["tokens"]["complete"] is False
    assert 0 < known["pods"][0]["matched_tokens"] <= len(tokens_of(TEXT))
    assert known["pods"][0]["pod"] == "pod-a"


async def test_a_salt_in_the_request_isolates_as_one_in_the_query(http: httpx.AsyncClient) -> None:
    for salted in (
        {"text": TEXT, "cache_salt": "tenant"},
        {"completion": {"prompt": TEXT, "cache_salt": "tenant"}},
    ):
        assert (await http.post("/v1/candidates", json={"model": MODEL, **salted})).json()["pods"] == []
    both = {"model": MODEL, "completion": {"prompt": TEXT, "cache_salt": "a"}, "cache_salt": "b"}
    answer = await http.post("/v1/score", json=both)
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "cache_salt")


async def test_llmds_example_routes_answer_scores_by_pod(http: httpx.AsyncClient) -> None:
    completion = await http.post("/score_completions", json={"model": MODEL, "prompt": TEXT})
    assert completion.json() == {"pod-a": float(len(tokens_of(TEXT)) // BLOCK)}
    for name in ("messages", "conversation"):
        chat = await http.post("/score_chat_completions", json={"model": MODEL, name: MESSAGES})
        assert chat.json() == {"pod-b": float(len(tokens_of(RENDERED)) // BLOCK)}
    unknown = await http.post("/score_completions", json={"model": MODEL, "prompt": "something else entirely"})
    assert unknown.json() == {}


async def test_llmds_example_routes_take_what_engines_take_in_such_requests(http: httpx.AsyncClient) -> None:
    for side, scores in (("right", {"pod-a": 2.0}), ("left", {})):
        cut = {"truncate_prompt_tokens": 2 * BLOCK, "truncation_side": side}
        completion = await http.post("/score_completions", json={"model": MODEL, "prompt": TEXT, **cut})
        assert completion.json() == scores
    chat = await http.post(
        "/score_chat_completions", json={"model": MODEL, "messages": MESSAGES, "reasoning_effort": "enormous"}
    )
    assert (chat.status_code, chat.json()["error"]["field"]) == (422, "reasoning_effort")


def lone_surrogate(body: dict[str, Any]) -> bytes:
    return json.dumps(body).replace("SURROGATE", "\\ud800").encode()


@pytest.mark.parametrize(
    ("body", "status", "field", "reason"),
    [
        ({"model": "nobody/knows", "text": "hi"}, 422, "model", "unknown_model"),
        ({"model": "../../etc", "text": "hi"}, 422, "model", "unknown_model"),
        ({"model": MODEL, "chat": {"messages": []}}, 422, "chat.messages", "bad_messages"),
        ({"model": MODEL, "chat": {"messages": [{"content": "hi"}]}}, 422, "chat.messages[0].role", "bad_messages"),
        ({"model": MODEL, "chat": {"messages": [{"role": 7, "content": "hi"}]}}, 422, "chat.messages[0].role", "bad_messages"),
        ({"model": MODEL, "chat": {"messages": MESSAGES, "chat_template": "{{"}}, 422, "chat.chat_template", "bad_template"),
        (
            {"model": MODEL, "chat": {"messages": MESSAGES, "truncate_prompt_tokens": 10**9}},
            422,
            "chat.truncate_prompt_tokens",
            "bad_truncation",
        ),
        ({"model": MODEL, "text": "a b " * 9000}, 422, "text", "too_many_tokens"),
        ({"model": MODEL, "text": ""}, 422, "text", "bad_text"),
        (
            {
                "model": MODEL,
                "chat": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            },
            501,
            "chat.messages[0].content[0]",
            "unsupported",
        ),
    ],
)
async def test_what_cannot_be_tokenized_is_told_by_field_and_counted(
    http: httpx.AsyncClient, body: dict[str, Any], status: int, field: str, reason: str
) -> None:
    answer = await http.post("/v1/score", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["field"], error["reason"]) == (status, field, reason)
    assert error["problem"]
    assert error["remedy"]
    metrics = (await http.get("/metrics")).text
    assert f'kv_cache_tokenization_failures_total{{reason="{reason}"}} 1.0' in metrics


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model": MODEL, "text": "a", "token_ids": [1]}, "text"),
        ({"model": MODEL, "chat": {"messages": "hi"}}, "chat.messages"),
        ({"model": MODEL, "chat": {}}, "chat.messages"),
        ({"model": MODEL, "text": "a", "tokenize": {"policy": "soon"}}, "tokenize.policy"),
        ({"model": MODEL, "text": "a", "tokenize": {"police": "stored"}}, "tokenize.police"),
        ({"model": MODEL, "text": "a", "multimodal": [{"hash": "x", "offset_tokens": 0}]}, "multimodal"),
        ({"model": MODEL, "completion": {"prompt": [1, 2], "truncate_prompt_tokens": 1}}, "completion.truncate_prompt_tokens"),
        ({"model": MODEL, "completion": {"prompt": "a", "truncate_prompt_tokens": -2}}, "completion.truncate_prompt_tokens"),
        ({"model": MODEL}, "token_ids"),
    ],
)
async def test_a_wrong_request_is_refused_by_field(http: httpx.AsyncClient, body: dict[str, Any], field: str) -> None:
    answer = await http.post("/v1/score", json=body)
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, field)


async def test_a_broken_tokenizer_is_told_as_the_models_fault_and_hides_no_path_in_the_field(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    async with running(f"tokens.models.broken={tmp_path}") as addresses, client(addresses) as http:
        for prompt in ({"text": "hi"}, {"chat": {"messages": MESSAGES}}):
            answer = await http.post("/v1/score", json={"model": "broken", **prompt})
            error = answer.json()["error"]
            assert (answer.status_code, error["field"], error["reason"]) == (501, "model", "broken_tokenizer")
            assert "tokenizer.json" in error["problem"]


async def test_a_service_is_ready_when_the_named_tokenizers_are_loaded() -> None:
    async with running(*WITH_TOKENIZER) as addresses, client(addresses) as http:
        for _ in range(500):
            answer = await http.get("/readyz")
            if answer.status_code == 200:
                break
            await asyncio.sleep(0.02)
        assert answer.status_code == 200
        assert "\nkv_cache_tokenizers_loaded 1.0\n" in (await http.get("/metrics")).text


async def test_an_alias_of_a_model_has_its_tokenizer() -> None:
    async with running(*WITH_TOKENIZER, f"models.other={MODEL}") as addresses, client(addresses) as http:
        scored = (await http.post("/v1/score", json={"model": "other", "text": TEXT})).json()
        assert scored["prompt_tokens"] == len(tokens_of(TEXT))


async def test_all_that_failed_is_told_where_several_were_asked() -> None:
    elsewhere = ("tokens.renderer.endpoints=[http://127.0.0.1:9]", "tokens.service.address=127.0.0.1:9")
    async with running(*WITH_TOKENIZER, *elsewhere) as addresses, client(addresses) as http:
        error = (await http.post("/v1/score", json={"model": "nobody", "text": "hi"})).json()["error"]
        assert error["reason"] == "unavailable"
        assert "unknown_model" in error["problem"]


async def test_invalid_utf8_and_surrogates_are_refused(http: httpx.AsyncClient) -> None:
    raw = await http.post("/v1/score", content=b'{"model": "m", "text": "\xff\xfe"}')
    assert raw.status_code == 400
    chat = {"messages": [{"role": "user", "content": "SURROGATE"}]}
    for prompt in ({"text": "SURROGATE"}, {"chat": chat}):
        answer = await http.post("/v1/score", content=lone_surrogate({"model": MODEL, **prompt}))
        assert answer.status_code in (400, 422)
        assert answer.json()["error"]["problem"]


async def test_a_request_without_tokens_can_still_be_routed(http: httpx.AsyncClient) -> None:
    asked = {"model": MODEL, "text": "a b " * 9000, "tokenize": {"on_failure": "unscored"}}
    answer = await http.post("/v1/score", json=asked)
    scored = answer.json()
    assert answer.status_code == 200
    assert {pod["pod"]: pod["score"] for pod in scored["pods"]} == {"pod-a": 0, "pod-b": 0, "pod-c": 0}
    tokens = scored["tokens"]
    assert (tokens["source"], tokens["exact"], tokens["failure"]["reason"]) == ("none", False, "too_many_tokens")
    assert tokens["estimated_count"] == 9000
    assert 'kv_cache_unscored_queries_total{reason="too_many_tokens"} 1.0' in (await http.get("/metrics")).text


async def test_megabytes_of_text_are_bounded_and_leave_the_service_responsive() -> None:
    bounds = ("tokens.textCharsMax=100000", f"tokens.maxModelLen.{MODEL}=100000000")
    async with running(*WITH_TOKENIZER, *bounds) as addresses, client(addresses) as http:
        answer = await http.post("/v1/score", json={"model": MODEL, "text": "x" * 3_000_000})
        assert (answer.status_code, answer.json()["error"]["reason"]) == (422, "bad_text")
        assert "tokens.textCharsMax" in answer.json()["error"]["problem"]
        assert (await http.post("/v1/score", json={"model": MODEL, "text": "x"})).status_code == 200


async def test_the_event_loop_answers_while_a_long_text_is_tokenized() -> None:
    patient = ("tokens.timeout=100s", "api.requestTimeout=100s")  # it takes 3 s alone
    async with (
        running(*WITH_TOKENIZER, *patient, f"tokens.maxModelLen.{MODEL}=100000000") as addresses,
        client(addresses) as http,
    ):
        http.timeout = 100
        await http.post("/v1/score", json={"model": MODEL, "text": "load"})
        long_text = " ".join(f"word{number}" for number in range(400_000))
        slow = asyncio.create_task(http.post("/v1/score", json={"model": MODEL, "text": long_text}))
        answered = 0
        while not slow.done():
            assert (await http.get("/healthz")).status_code == 200
            answered += 1
        assert (await slow).status_code in (200, 422)
        assert answered > 5


async def test_grpc_takes_text_and_chats(service: Addresses) -> None:
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        stub = kvatlas_pb2_grpc.KvAtlasStub(channel)
        by_text = await stub.Score(kvatlas_pb2.ScoreRequest(prompt=kvatlas_pb2.PromptQuery(model=MODEL, text=TEXT)))
        assert (by_text.pods[0].pod, by_text.tokens.source, by_text.tokens.complete) == ("pod-a", "local", True)
        chat = kvatlas_pb2.PromptQuery(model=MODEL, chat_json=json.dumps({"messages": MESSAGES}))
        assert [pod.pod for pod in (await stub.Candidates(kvatlas_pb2.CandidatesRequest(prompt=chat))).pods] == ["pod-b"]
        located = await stub.Locality(kvatlas_pb2.LocalityRequest(prompt=chat))
        assert located.tokens.count == len(tokens_of(RENDERED))
        unscored = kvatlas_pb2.PromptQuery(
            model="nobody", text="x", tokenize=kvatlas_pb2.TokenizeOptions(unscored_on_failure=True)
        )
        answer = await stub.Score(kvatlas_pb2.ScoreRequest(prompt=unscored))
        assert (answer.tokens.failure.reason, answer.tokens.exact) == ("unknown_model", False)
        no_messages = kvatlas_pb2.PromptQuery(model=MODEL, chat_json='{"messages": []}')
        with pytest.raises(grpc.aio.AioRpcError, match=r"chat_json\.messages") as raised:
            await stub.Score(kvatlas_pb2.ScoreRequest(prompt=no_messages))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        no_policy = kvatlas_pb2.PromptQuery(model=MODEL, text="a", tokenize=kvatlas_pb2.TokenizeOptions(policy="soon"))
        with pytest.raises(grpc.aio.AioRpcError, match=r"tokenize\.policy"):
            await stub.Score(kvatlas_pb2.ScoreRequest(prompt=no_policy))


async def test_llmds_grpc_clients_send_text(service: Addresses) -> None:
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        stub = indexer_pb2_grpc.IndexerServiceStub(channel)
        answer = await stub.GetPodScores(indexer_pb2.GetPodScoresRequest(prompt=TEXT, model_name=MODEL))
        assert [(score.pod, score.score) for score in answer.scores] == [("pod-a", float(len(tokens_of(TEXT)) // BLOCK))]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.GetPodScores(indexer_pb2.GetPodScoresRequest(prompt=TEXT, model_name="nobody"))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
