"""An embedded engine over its real API and event ports, as routers, renderers and clients use it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from kvatlas.config import Config, RendererSettings
from kvatlas.discovery.engine_metrics import read_figures
from kvatlas.discovery.orca import read_orca
from kvatlas.doctor.announced import announced_blocks
from kvatlas.errors import ConfigError
from kvatlas.indexer import Indexer
from kvatlas.ingest.decode.vllm import VllmDecoder
from kvatlas.ingest.topic import parse_topic
from kvatlas.keys.engine_hashes import HashScheme, identify, known_schemes
from kvatlas.results import Query
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.live.faults import Fault
from kvatlas.sim.live.server import RunningEngine
from kvatlas.tokens.prompts import ChatPrompt, TextPrompt
from kvatlas.tokens.remote.render import RendererBackend
from kvatlas.types import Stream
from tests.integration.engines import until
from tests.integration.test_publisher import connected, replay
from tests.models.embedded import QUICK, embedded, tokens

CHAT = {"messages": [{"role": "user", "content": "one two three four five six seven eight nine ten eleven twelve"}]}
PROMPT = list(range(300, 300 + 100))
SLOW = msgspec.structs.replace(QUICK, costs=EngineCosts(step_s=3600, prefill_token_s=0))
"""Nothing is ever answered."""


async def asked(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


async def published(engine: RunningEngine) -> list[list[bytes]]:
    """Return all frames that were published so far: topic, number, payload."""
    async with connected(zmq.DEALER, engine.started.replay) as socket:
        return [answer[1:] for answer in (await replay(socket, 0))[:-1]]


def events_of(frames: list[list[bytes]]) -> list[dict[str, Any]]:
    return [event for frame in frames for event in msgspec.msgpack.decode(frame[2])[1]]


# -- answers ------------------------------------------------------------------------------------------------------------


async def test_equal_requests_get_equal_answers_and_the_second_finds_its_prompt_cached() -> None:
    async with embedded() as (_, client):
        one, two = [await asked(client, "/v1/chat/completions", **CHAT, max_tokens=8) for _ in range(2)]
    assert one["choices"] == two["choices"]
    assert len(one["choices"][0]["message"]["content"].split()) == 8
    prompt = one["usage"]["prompt_tokens"]
    assert (cached(one), cached(two)) == (0, (prompt - 1) // 16 * 16)
    assert one["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": prompt,
        "completion_tokens": 8,
        "total_tokens": prompt + 8,
        "prompt_tokens_details": None,
    }


async def test_a_chats_next_turn_finds_the_answer_cached_too() -> None:
    async with embedded() as (_, client):
        first = await asked(client, "/v1/chat/completions", **CHAT, max_tokens=40, return_token_ids=True)
        said = first["choices"][0]
        turn = [*CHAT["messages"], said["message"], {"role": "user", "content": "and then"}]
        second = await asked(client, "/v1/chat/completions", messages=turn, max_tokens=1, return_token_ids=True)
    sequence = first["prompt_token_ids"] + said["token_ids"]
    assert second["prompt_token_ids"][: len(sequence)] == sequence
    assert cached(second) == (len(sequence) - 1) // 16 * 16


async def test_a_stream_says_the_same_as_a_whole_answer() -> None:
    async with embedded() as (_, client):
        whole = await asked(client, "/v1/completions", prompt=PROMPT, max_tokens=5, return_token_ids=True)
        body = {"prompt": PROMPT, "max_tokens": 5, "stream": True, "return_token_ids": True}
        answer = await client.post("/v1/completions", json={**body, "stream_options": {"include_usage": True}})
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    *pieces, usage = map(json.loads, lines)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["choices"][0]["text"]
    ids = [token for piece in pieces for token in piece["choices"][0]["token_ids"]]
    assert ids == whole["choices"][0]["token_ids"]
    assert pieces[0]["choices"][0]["prompt_token_ids"] == PROMPT
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-1] == "length"


async def test_a_streamed_chat_begins_with_who_speaks() -> None:
    async with embedded() as (_, client):
        answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 2})
    first = json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in answer.text


async def test_requests_with_other_salts_share_nothing() -> None:
    async with embedded() as (_, client):
        answers = [
            await asked(client, "/v1/completions", prompt=PROMPT, max_tokens=1, cache_salt=salt) for salt in ("a", "b", "a")
        ]
    assert [cached(answer) for answer in answers] == [0, 0, 96]


async def test_requests_at_the_same_time_are_batched_and_all_answered() -> None:
    async with embedded() as (_, client):
        bodies = [{"prompt": [i] * 40, "max_tokens": 10} for i in range(1, 21)]
        answers = await asyncio.gather(*(asked(client, "/v1/completions", **body) for body in bodies))
    assert all(answer["usage"]["completion_tokens"] == 10 for answer in answers)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", b"{", 400, "body"),
        ("/v1/completions", b"{}", 400, "prompt"),
        ("/v1/completions", b'{"prompt": []}', 400, "prompt"),
        ("/v1/completions", b'{"prompt": [-1]}', 400, "prompt"),
        ("/v1/completions", b'{"prompt": ["a", "b"]}', 400, "prompt"),
        ("/v1/completions", b'{"prompt": "a", "n": 2}', 400, "n"),
        ("/v1/completions", b'{"prompt": "a", "logprobs": 1}', 400, "logprobs"),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens"),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": 100000}', 400, "max_tokens"),
        ("/v1/completions", b'{"prompt": "a", "model": "other"}', 404, "model"),
        ("/v1/chat/completions", b"{}", 400, "messages"),
        ("/v1/nothing", b"{}", 404, None),
    ],
)
async def test_what_is_wrong_with_a_request_is_told_in_openais_form(
    path: str, body: bytes, status: int, param: str | None
) -> None:
    async with embedded() as (_, client):
        answer = await client.post(path, content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (status, param)
    assert error["message"]


async def test_beyond_its_bound_requests_are_refused_and_a_client_that_goes_makes_room() -> None:
    async with embedded(SLOW, requests_max=1) as (engine, client):
        first = asyncio.create_task(client.post("/v1/completions", json={"prompt": PROMPT}))
        await until(lambda: engine.live.state.running == 1)
        refused = await client.post("/v1/completions", json={"prompt": PROMPT})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await until(lambda: engine.live.state.running == 0)
        assert engine.live.state.blocks_used == 0


async def test_an_engine_that_stops_ends_what_is_under_way() -> None:
    async with embedded(SLOW) as (engine, client):
        first = asyncio.create_task(client.post("/v1/completions", json={"prompt": PROMPT}))
        await until(lambda: engine.live.state.running == 1)
        engine.task.cancel()
        answer = await first
    assert answer.status_code == 503
    assert "stops" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("options", "says"), [({"host": "0.0.0.0"}, "--pod"), ({"max_model_len": 5000}, "--max-model-len")])  # noqa: S104
async def test_what_cannot_work_is_refused_at_the_start(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        async with embedded(**options):
            pass


# -- what it tells ------------------------------------------------------------------------------------------------------


async def test_the_index_knows_from_events_what_each_request_will_find_cached() -> None:
    """With a cache so small that blocks are evicted all the time."""
    spec = msgspec.structs.replace(QUICK, gpu_blocks=40)
    prompts = [[family] * 64 + [family, number] * 40 for number in range(6) for family in (1, 2, 3, 1)]
    indexer, fed, compared = Indexer(Config()), 0, 0
    async with embedded(spec, pod="here") as (engine, client):
        for prompt in prompts:
            frames = await published(engine)
            for topic, _, payload in frames[fed:]:
                pod, model = parse_topic(topic.decode())
                assert (pod, model) == ("here", "tiny")
                decoded = VllmDecoder().decode(payload)
                assert decoded.faults == ()
                for batch in decoded.batches:
                    indexer.index.apply(Stream(pod, batch.dp_rank), msgspec.structs.replace(batch, model=model))
            fed = len(frames)
            pods = indexer.score(Query(prompt, "tiny")).pods
            answer = await asked(client, "/v1/completions", prompt=prompt, max_tokens=20)
            assert (pods[0].predicted_cached_tokens if pods else 0) == cached(answer)
            compared += cached(answer) > 0
    assert compared > 10
    assert any(event["type"] == "BlockRemoved" for event in events_of(frames))


@pytest.mark.parametrize("scheme", [HashScheme("sha256_cbor", "0"), HashScheme("xxhash_cbor", "42")])
async def test_block_hashes_are_those_of_vllm(scheme: HashScheme) -> None:
    async with embedded(scheme=scheme) as (engine, client):
        for salt in (None, "pepper"):
            await asked(client, "/v1/completions", prompt=PROMPT, max_tokens=30, cache_salt=salt)
        frames = await published(engine)
    blocks = [block for frame in frames for block in announced_blocks(frame[2])]
    match = identify(blocks, known_schemes())
    assert match is not None
    assert match.scheme == scheme
    assert match.matched == match.checked == len(blocks) == 2 * ((100 + 29) // 16)


async def test_a_reset_is_told_with_the_next_steps_events() -> None:
    async with embedded() as (engine, client):
        await asked(client, "/v1/completions", prompt=PROMPT, max_tokens=1)
        assert (await client.post("/reset_prefix_cache")).status_code == 200
        before = await published(engine)
        answer = await asked(client, "/v1/completions", prompt=PROMPT, max_tokens=1)
        after = await published(engine)
    assert cached(answer) == 0
    assert all(event["type"] != "AllBlocksCleared" for event in events_of(before))
    assert [event["type"] for event in events_of(after[len(before) :])] == ["AllBlocksCleared", "BlockStored"]


async def test_a_reset_is_refused_while_requests_run() -> None:
    async with embedded(SLOW) as (engine, client):
        first = asyncio.create_task(client.post("/v1/completions", json={"prompt": PROMPT}))
        await until(lambda: engine.live.state.running == 1)
        assert (await client.post("/reset_prefix_cache")).status_code == 500
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_metrics_say_what_a_router_reads() -> None:
    async with embedded() as (_, client):
        for _ in range(2):
            await asked(client, "/v1/completions", prompt=PROMPT, max_tokens=3)
        page = (await client.get("/metrics")).content
    report = read_figures(page, "vllm").report(0.0)
    assert (report.waiting, report.running, report.kv_usage) == (0, 0, 0.0)
    assert (report.block_size_tokens, report.gpu_blocks) == (16, 256)
    lines = dict(line.rsplit(" ", 1) for line in page.decode().splitlines() if not line.startswith("#"))
    labels = '{engine="0",model_name="tiny"}'
    assert lines[f"vllm:prefix_cache_queries_total{labels}"] == "200.0"
    assert lines[f"vllm:prefix_cache_hits_total{labels}"] == "96.0"
    assert lines[f"vllm:time_to_first_token_seconds_count{labels}"] == "2.0"
    assert lines[f"vllm:generation_tokens_total{labels}"] == "6.0"


@pytest.mark.parametrize("form", ["JSON", "TEXT"])
async def test_load_is_told_in_a_header_where_it_is_asked_for(form: str) -> None:
    async with embedded() as (_, client):
        body = {"prompt": PROMPT, "max_tokens": 1}
        asked_for = await client.post("/v1/completions", json=body, headers={"endpoint-load-metrics-format": form})
        plain = await client.post("/v1/completions", json=body)
    load = read_orca(asked_for.headers)
    assert load is not None
    assert (load.waiting, load.running, load.kv_usage) == (0, 0, 0.0)
    assert read_orca(plain.headers) is None


async def test_it_renders_and_tokenizes_as_its_own_prompts() -> None:
    prompts = (ChatPrompt(model="tiny", messages=CHAT["messages"]), TextPrompt(model="tiny", text="to be or not"))
    async with embedded() as (engine, client):
        renderer = RendererBackend(RendererSettings(endpoints=(engine.started.url,)))
        for prompt in prompts:
            rendered = await asyncio.to_thread(renderer.tokenize, prompt, 60.0)
            assert rendered.token_ids == tokens().tokens(prompt)
        renderer.close()
        told = await asked(client, "/tokenize", prompt="to be or not")
        assert told["tokens"] == tokens().tokens(prompts[1]).tolist()
        assert told["count"] == len(told["tokens"])
        assert (await asked(client, "/detokenize", tokens=told["tokens"]))["prompt"] == "to be or not"


async def test_it_says_what_it_is_and_where_its_events_are() -> None:
    async with embedded(model="llama", pod="engine-7") as (engine, client):
        (model,) = (await client.get("/v1/models")).json()["data"]
        (source,) = (await client.get("/kv_event_sources")).json()
        assert (await client.get("/health")).status_code == 200
        assert "kvatlas" in (await client.get("/version")).json()["version"]
    assert (model["id"], model["max_model_len"]) == ("llama", 255 * 16)
    assert source == {
        "data_parallel_rank": 0,
        "endpoint": engine.started.events,
        "replay_endpoint": engine.started.replay,
        "topic": "kv@engine-7@llama",
    }


# -- what goes wrong on purpose -----------------------------------------------------------------------------------------


async def set_faults(client: httpx.AsyncClient, *faults: dict[str, Any]) -> None:
    answer = await client.put("/faults", json={"faults": faults})
    assert answer.status_code == 200, answer.text


STREAM = {"prompt": PROMPT, "max_tokens": 5, "stream": True}


def text_of(line: str) -> str:
    """Return what one line of a stream, or a whole answer, says."""
    body = line.removeprefix("data: ")
    return json.loads(body)["choices"][0]["text"] if body.startswith("{") else ""


def said(answer: httpx.Response) -> str:
    return "".join(map(text_of, answer.text.splitlines()))


async def test_requests_are_refused_as_often_as_is_asked_for() -> None:
    async with embedded(faults=(Fault("status", status=429, times=2),)) as (_, client):
        answers = [await client.post("/v1/completions", json={"prompt": PROMPT}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [429, 429, 200]
    assert (answers[0].headers["Retry-After"], answers[0].json()["error"]["code"]) == ("1", 429)


async def test_faults_are_shown_and_set_while_it_runs() -> None:
    async with embedded() as (_, client):
        assert (await client.get("/faults")).json() == {"faults": []}
        await set_faults(client, {"kind": "status", "status": 500, "times": 1}, {"kind": "lose-events"})
        assert (await client.post("/v1/completions", json={"prompt": PROMPT})).status_code == 500
        assert (await client.get("/faults")).json() == {"faults": [{"kind": "lose-events"}]}
        refused = await client.put("/faults", json={"faults": [{"kind": "explode"}]})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "faults[0].kind"


@pytest.mark.parametrize("body", [STREAM, {**STREAM, "stream": False}])
async def test_a_connection_is_cut_before_an_answer_or_in_its_midst(body: dict[str, Any]) -> None:
    async with embedded() as (engine, client):
        for fault in ("reset", "cut"):
            await set_faults(client, {"kind": fault, "times": 1})
            with pytest.raises(httpx.TransportError):
                await client.post("/v1/completions", json=body)
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        await until(lambda: engine.live.state.running == 0)
        assert engine.live.state.blocks_used == 0


@pytest.mark.parametrize("body", [STREAM, {**STREAM, "stream": False}])
@pytest.mark.parametrize("kind", ["hang", "stall"])
async def test_what_hangs_or_stalls_goes_on_once_faults_are_over(kind: str, body: dict[str, Any]) -> None:
    async with embedded() as (_, client):
        plain = await client.post("/v1/completions", json=body)
        await set_faults(client, {"kind": kind, "after": 2})
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        for _ in range(3):  # requests that are answered meanwhile
            await asked(client, "/tokenize", prompt="to be or not")
        assert not asking.done()
        await set_faults(client)
        answer = await asking
    assert said(answer) == said(plain)
    assert len(said(plain).split()) == 5


async def test_a_stream_stalls_after_the_tokens_that_it_is_to_tell() -> None:
    async with (
        embedded(faults=(Fault("stall", after=2),)) as (_, client),
        client.stream("POST", "/v1/completions", json=STREAM) as answer,
    ):
        pieces, told = answer.aiter_lines(), ""
        while len(told.split()) < 2:
            told += text_of(await anext(pieces))
        await set_faults(client)
        rest = [line async for line in pieces]
    assert [len(text.split()) for text in (told, "".join(map(text_of, rest)))] == [2, 3]
    assert "data: [DONE]" in rest


async def test_lost_events_are_a_gap_that_no_replay_heals() -> None:
    async with embedded() as (engine, client):
        for first in (300, 600, 900):
            await set_faults(client, *([{"kind": "lose-events"}] if first == 600 else []))
            await asked(client, "/v1/completions", prompt=list(range(first, first + 64)), max_tokens=1)
        numbers = [int.from_bytes(frame[1], "big") for frame in await published(engine)]
    assert numbers == [0, 2]


async def test_what_is_no_http_1_is_told_of_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    async with embedded() as (engine, _):
        address = engine.started.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(address[0], int(address[1]))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert b"400" in await reader.read()
        writer.close()
    told = [record for record in caplog.records if record.name == "kvatlas.engine"]
    assert [record.exc_info for record in told] == [None]
