"""The gRPC services on a real server: what they answer, and what they refuse."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
import pytest_asyncio
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvatlas.proto.indexer.v1 import indexer_pb2, indexer_pb2_grpc
from kvatlas.proto.kvatlas.v1 import kvatlas_pb2, kvatlas_pb2_grpc
from kvatlas.serve.service import Addresses
from tests.integration.running import BLOCK, MODEL, PROMPT, client, filled, publish, running, stored

pytestmark = pytest.mark.asyncio(loop_scope="module")

PUBLISH = kvatlas_pb2.PublishEventsRequest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service() -> AsyncIterator[Addresses]:
    async with running("api.bodyBytesMax=256KiB", "api.tokensMax=20000", "api.keysMax=100") as addresses:
        await filled(addresses)
        yield addresses


@pytest_asyncio.fixture(loop_scope="module")
async def channel(service: Addresses) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(service.grpc) as opened:
        yield opened


@pytest.fixture
def atlas(channel: grpc.aio.Channel) -> kvatlas_pb2_grpc.KvAtlasAsyncStub:
    return kvatlas_pb2_grpc.KvAtlasStub(channel)


@pytest.fixture
def llmd(channel: grpc.aio.Channel) -> indexer_pb2_grpc.IndexerServiceAsyncStub:
    return indexer_pb2_grpc.IndexerServiceStub(channel)


def prompt(**fields: object) -> kvatlas_pb2.PromptQuery:
    return kvatlas_pb2.PromptQuery(**{"token_ids": PROMPT, "model": MODEL, **fields})  # type: ignore[arg-type]


# -- answers --------------------------------------------------------------------------------------------------------------


async def test_llmds_clients_get_scores_for_token_ids(llmd: indexer_pb2_grpc.IndexerServiceAsyncStub) -> None:
    asked = indexer_pb2.GetPodScoresRequest(prompt=json.dumps(PROMPT), model_name=MODEL)
    answer = await llmd.GetPodScores(asked)
    assert [(score.pod, score.score) for score in answer.scores] == [("pod-a", 5.0), ("pod-b", 2.0)]
    asked.pod_identifiers.extend(["pod-b", "unknown"])
    assert [score.pod for score in (await llmd.GetPodScores(asked)).scores] == ["pod-b"]


async def test_llmds_contract_is_kept_field_for_field() -> None:
    def fields(message: str) -> dict[str, int]:
        return {field.name: field.number for field in indexer_pb2.DESCRIPTOR.message_types_by_name[message].fields}

    assert fields("GetPodScoresRequest") == {"prompt": 1, "model_name": 2, "pod_identifiers": 3}
    assert fields("GetPodScoresResponse") == {"scores": 1}
    assert fields("PodScore") == {"pod": 1, "score": 2}
    (method,) = indexer_pb2.DESCRIPTOR.services_by_name["IndexerService"].methods
    assert method.full_name == "indexer.v1.IndexerService.GetPodScores"


async def test_score_and_candidates_agree_with_each_other(atlas: kvatlas_pb2_grpc.KvAtlasAsyncStub) -> None:
    scored = await atlas.Score(kvatlas_pb2.ScoreRequest(prompt=prompt()))
    assert (scored.blocks, scored.cache_hits, scored.coverage, scored.prompt_tokens) == (5, 5, 1.0, 80)
    best = scored.pods[0]
    assert (best.pod, best.matched_tokens, best.predicted_cached_tokens) == ("pod-a", 80, 4 * BLOCK)
    assert (dict(best.tiers), dict(best.predicted_by_rank)) == ({"gpu": 5}, {0: 4 * BLOCK})
    assert (best.stale, best.HasField("stale_reason")) == (False, False)
    found = await atlas.Candidates(kvatlas_pb2.CandidatesRequest(prompt=prompt(), limit=1))
    assert list(found.pods) == [best]
    assert len((await atlas.Candidates(kvatlas_pb2.CandidatesRequest(prompt=prompt()))).pods) == 2


async def test_locality_answers_the_same_by_prompt_and_by_keys(atlas: kvatlas_pb2_grpc.KvAtlasAsyncStub) -> None:
    by_prompt = await atlas.Locality(kvatlas_pb2.LocalityRequest(prompt=prompt()))
    assert [len(block.holders) for block in by_prompt.blocks] == [2, 2, 1, 1, 1]
    keys = [block.key for block in by_prompt.blocks]
    assert await atlas.Locality(kvatlas_pb2.LocalityRequest(keys=keys)) == by_prompt
    only_b = await atlas.Locality(kvatlas_pb2.LocalityRequest(keys=keys[:1], pods=["pod-b"]))
    assert [holder.pod for holder in only_b.blocks[0].holders] == ["pod-b"]


async def test_pods_shows_every_stream(atlas: kvatlas_pb2_grpc.KvAtlasAsyncStub) -> None:
    streams = (await atlas.Pods(kvatlas_pb2.PodsRequest())).streams
    assert [(stream.pod, stream.state, stream.blocks, stream.next_seq) for stream in streams] == [
        ("pod-a", "fresh", 5, 1),
        ("pod-b", "fresh", 2, 1),
    ]
    assert dict(streams[0].groups) == {0: "full"}


async def test_reflection_tells_both_contracts(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    def ask() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="indexer.v1.IndexerService")

    answers = [answer async for answer in stub.ServerReflectionInfo(ask())]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"indexer.v1.IndexerService", "kvatlas.v1.KvAtlas", "grpc.health.v1.Health"} <= names
    file = FileDescriptorProto.FromString(answers[1].file_descriptor_response.file_descriptor_proto[0])
    assert file.package == "indexer.v1"


async def test_health_is_told_for_the_whole_and_for_each_service(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", "liveness", "readiness", "indexer.v1.IndexerService", "kvatlas.v1.KvAtlas"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


# -- publishing -----------------------------------------------------------------------------------------------------------


async def test_refused_frames_are_counted_named_and_do_not_end_the_stream() -> None:
    async with running() as addresses:
        frames = [
            stored("pod-c", 0),
            PUBLISH(topic="nothing", payload=b"\x93"),
            PUBLISH(topic=f"kv@pod-x@{MODEL}", payload=b"", decoder="klingon"),
            stored("pod-c", 1, list(range(16)), 50),
        ]
        answer = await publish(addresses, frames)
        assert (answer.accepted, answer.rejected) == (2, 2)
        assert [(refused.position, refused.field) for refused in answer.rejections] == [(1, "pod"), (2, "decoder")]
        assert "vllm" in answer.rejections[1].remedy


async def test_a_lost_frame_makes_the_pod_stale_and_the_answer_says_so() -> None:
    async with running() as addresses, client(addresses) as http:
        await publish(addresses, [stored("pod-c", 0), stored("pod-c", 5, list(range(16)), 50)])
        for _ in range(200):
            (pod,) = (await http.get("/v1/pods")).json()["pods"]
            if pod["gaps"] and pod["state"] == "stale":
                break
            await asyncio.sleep(0.02)
        assert (pod["state"], pod["stale_reason"]) == ("stale", "gap")
        (scored,) = (await http.post("/v1/score", json={"model": MODEL, "token_ids": PROMPT})).json()["pods"]
        assert scored["stale"] is True
        metrics = (await http.get("/metrics")).text
        assert 'kv_cache_gaps_total{pod="pod-c"} 1.0' in metrics
        assert 'kv_cache_frames_missed_total{pod="pod-c"} 4.0' in metrics


async def test_a_payload_that_is_no_event_makes_the_pod_stale_and_is_counted() -> None:
    async with running() as addresses, client(addresses) as http:
        bad = stored("pod-c", 1)
        bad.payload = b"\xc1 this is not msgpack"
        answer = await publish(addresses, [stored("pod-c", 0), bad])
        assert answer.accepted == 2
        for _ in range(200):
            metrics = (await http.get("/metrics")).text
            if 'kv_cache_streams_stale{reason="decode_error"} 1.0' in metrics:
                break
            await asyncio.sleep(0.02)
        assert 'kv_cache_decode_errors_total{pod="pod-c",reason="' in metrics
        assert 'kv_cache_streams_stale{reason="decode_error"} 1.0' in metrics


async def test_a_publisher_faster_than_the_index_is_held_back_and_loses_nothing() -> None:
    async with running("ingest.queueFrames=2") as addresses, client(addresses) as http:
        frames = [stored("pod-c", seq, range(seq * 16, seq * 16 + 16), seq) for seq in range(200)]
        answer = await publish(addresses, frames)
        assert (answer.accepted, answer.rejected) == (200, 0)
        for _ in range(200):
            (pod,) = (await http.get("/v1/pods")).json()["pods"]
            if (pod["next_seq"], pod["queue_depth"]) == (200, 0):
                break
            await asyncio.sleep(0.02)
        assert (pod["blocks"], pod["gaps"], pod["state"]) == (200, 0, "fresh")


# -- refusals -------------------------------------------------------------------------------------------------------------


async def test_a_prompt_as_text_is_refused_rather_than_guessed(llmd: indexer_pb2_grpc.IndexerServiceAsyncStub) -> None:
    for text in ("Hello, world", "[INST] Hello [/INST]", '{"a": 1}', "12", ""):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await llmd.GetPodScores(indexer_pb2.GetPodScoresRequest(prompt=text, model_name=MODEL))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, text
        assert "JSON array" in (caught.value.details() or "")


@pytest.mark.parametrize("text", ["[1, -1]", "[1.5]", "[4294967296]", '["a"]', "[[1]]"])
async def test_token_ids_out_of_range_are_refused(llmd: indexer_pb2_grpc.IndexerServiceAsyncStub, text: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await llmd.GetPodScores(indexer_pb2.GetPodScoresRequest(prompt=text, model_name=MODEL))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (prompt(model=""), "model"),
        (prompt(scorer="nobody"), "scorer"),
        (prompt(token_ids=[7] * 20_001), "token_ids"),
        (prompt(multimodal=[kvatlas_pb2.MultimodalInput(hash="a", offset_tokens=80)]), "multimodal[0].offset_tokens"),
        (kvatlas_pb2.PromptQuery(), "model"),
    ],
)
async def test_a_bad_query_is_refused_by_field(
    atlas: kvatlas_pb2_grpc.KvAtlasAsyncStub, query: kvatlas_pb2.PromptQuery, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await atlas.Score(kvatlas_pb2.ScoreRequest(prompt=query))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(f"{field}: ")


@pytest.mark.parametrize(
    "request_",
    [
        kvatlas_pb2.LocalityRequest(),
        kvatlas_pb2.LocalityRequest(keys=[1], prompt=prompt()),
        kvatlas_pb2.LocalityRequest(keys=[1] * 101),
    ],
)
async def test_locality_needs_keys_or_a_prompt_within_limits(
    atlas: kvatlas_pb2_grpc.KvAtlasAsyncStub, request_: kvatlas_pb2.LocalityRequest
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await atlas.Locality(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_oversized_message_is_refused_and_the_service_goes_on(
    atlas: kvatlas_pb2_grpc.KvAtlasAsyncStub,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await atlas.Score(kvatlas_pb2.ScoreRequest(prompt=prompt(cache_salt="x" * 300_000)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await atlas.Score(kvatlas_pb2.ScoreRequest(prompt=prompt()))).blocks == 5


async def test_bytes_that_are_no_message_are_refused(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary("/kvatlas.v1.KvAtlas/Score")
    with pytest.raises(grpc.aio.AioRpcError):
        await call(b"\xff\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/kvatlas.v1.KvAtlas/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_publisher_that_goes_away_in_the_middle_leaves_the_service_well(service: Addresses) -> None:
    async def endless() -> AsyncIterator[PUBLISH]:
        yield stored("pod-d", 0, list(range(16)))
        await asyncio.Event().wait()

    async with grpc.aio.insecure_channel(service.grpc) as channel:
        call = kvatlas_pb2_grpc.KvAtlasStub(channel).PublishEvents(endless())
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    async with client(service) as http:
        pods = [pod["pod"] for pod in (await http.get("/v1/pods")).json()["pods"]]
        assert pods == ["pod-a", "pod-b", "pod-d"]


async def test_with_a_token_set_only_health_checks_pass_without_it() -> None:
    async with running("api.token=s3cret") as addresses, grpc.aio.insecure_channel(addresses.grpc) as channel:
        atlas = kvatlas_pb2_grpc.KvAtlasStub(channel)
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "Bearer s3cret"),) * 2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await atlas.Pods(kvatlas_pb2.PodsRequest(), metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await publish(addresses, [stored("pod-c", 0)], token="wrong")  # noqa: S106
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert (await publish(addresses, [stored("pod-c", 0)], token="s3cret")).accepted == 1  # noqa: S106
        await atlas.Pods(kvatlas_pb2.PodsRequest(), metadata=(("authorization", "Bearer s3cret"),))
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
