"""What a real vLLM 0.32 sent, replayed: every prediction is what the engine itself reported, or what its own hashes say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvatlas.config import Config, KeySettings
from kvatlas.indexer import Indexer
from kvatlas.ingest.decode.vllm import VllmDecoder
from kvatlas.ingest.recording import read_frames
from kvatlas.ingest.topic import parse_topic
from kvatlas.results import Query, ScoreResult
from kvatlas.types import ApplyReport, DpRank, Frame, Stream
from tests.models.oracle import HashOracle

CAPTURES = Path(__file__).parent.parent / "data" / "vllm-0.32"
ALL = sorted(path.name for path in CAPTURES.glob("*.bin"))
WITH_TRUTH = {"truth-base": 2, "truth-hybrid64": 3, "hybrid-gemma3": 1, "hybrid-gemma3-retention64": 1}
"""Captures with the engine's own cached_tokens, and how often each was reset."""
WITH_ORACLE = {
    "base-sha256_cbor": ["base-sha256_cbor"],
    "base-sha256_cbor-raw-bytes-hashes": ["base-sha256_cbor-raw-bytes-hashes"],
    "base-xxhash_cbor-seed42": ["base-xxhash_cbor-seed42"],
    "dp2-rank0": ["dp2-rank0", "dp2-rank1"],
    "offload-cpu-placeholder-events": ["offload-cpu-placeholder-events"],
    "offload-cpu-self-describing": ["offload-cpu-self-describing"],
    "offload-tiering-fs": ["offload-tiering-fs"],
}
"""Requests -> recordings. None of these models has sliding windows."""


class Replay:
    """Feeds recordings to an index in the order of their receive times."""

    def __init__(self, recordings: list[str], block_size: int = 16) -> None:
        self.indexer = Indexer(Config(keys=KeySettings(block_size=block_size)))
        self.report = ApplyReport()
        self.oracles: dict[DpRank, HashOracle] = {}
        frames = [frame for name in recordings for frame in read_frames(CAPTURES / f"{name}.bin")]
        self._frames = sorted(frames, key=lambda frame: frame.received_ns)
        self._next = 0

    def feed(self, until_s: float, *, oracle: bool = False) -> None:
        while self._next < len(self._frames) and self._frames[self._next].received_ns / 1e9 < until_s:
            self._apply(self._frames[self._next], oracle)
            self._next += 1

    def _apply(self, frame: Frame, oracle: bool) -> None:
        decoded = VllmDecoder().decode(frame.payload)
        assert decoded.faults == ()
        pod, model = parse_topic(frame.topic)
        assert pod is not None
        for batch in decoded.batches:
            rank = batch.dp_rank or DpRank(0)
            self.report.add(self.indexer.index.apply(Stream(pod, rank), msgspec.structs.replace(batch, model=model)))
            if oracle:
                self.oracles.setdefault(rank, HashOracle()).feed(frame.payload)

    def score(self, request: dict) -> ScoreResult:
        query = Query(request["prompt_token_ids"], request.get("model", "tiny"), cache_salt=request["kw"].get("cache_salt"))
        return self.indexer.score(query)


def requests_of(name: str) -> Iterator[tuple[dict, bool]]:
    """Yield the requests that carry a prompt, and whether each is the first after a reset."""
    after_reset = False
    for line in (CAPTURES / f"{name}.requests.jsonl").read_text().splitlines():
        request = json.loads(line)
        if "prompt_token_ids" in request:
            yield request, after_reset
            after_reset = False
        elif "reset" in request["tag"]:
            after_reset = True


@pytest.mark.parametrize("name", ALL)
def test_every_hash_is_explained(name: str) -> None:
    """Each removal names a block that is held, and at the end no block is left whose tokens are unknown."""
    replay = Replay([name.removesuffix(".bin")])
    replay.feed(float("inf"))
    assert replay.report.stored > 0
    assert replay.report.removed_unknown == 0
    assert replay.report.orphans_dropped == 0
    assert replay.indexer.stats().orphans == 0


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("name", WITH_TRUTH)
def test_predictions_equal_the_engines_cached_tokens(name: str, block_size: int) -> None:
    """Exact for every request but the first after a reset: the engine publishes the clear one step late."""
    replay = Replay([name], block_size)
    compared, resets = 0, 0
    for request, after_reset in requests_of(name):
        replay.feed(request["t"])
        resets += after_reset
        truth = request["usage"]["prompt_tokens_details"]["cached_tokens"]
        pods = replay.score(request).pods
        predicted = pods[0].predicted_cached_tokens if pods else 0
        if not after_reset:
            assert predicted == truth, request["tag"]
            compared += 1
    assert resets == WITH_TRUTH[name]
    assert compared >= 16


@pytest.mark.parametrize("name", WITH_TRUTH)
def test_larger_index_blocks_predict_the_same_rounded_down(name: str) -> None:
    replay = Replay([name], 64)
    for request, after_reset in requests_of(name):
        replay.feed(request["t"])
        truth = request["usage"]["prompt_tokens_details"]["cached_tokens"]
        pods = replay.score(request).pods
        if not after_reset and pods and "hybrid" not in name:
            assert pods[0].predicted_cached_tokens == truth // 64 * 64, request["tag"]
        elif not after_reset and pods:
            assert pods[0].predicted_cached_tokens <= truth, request["tag"]


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_predictions_equal_an_oracle_of_engine_hashes(name: str) -> None:
    replay = Replay(WITH_ORACLE[name])
    compared = hits = 0
    for request, _ in requests_of(name):
        replay.feed(request["t"], oracle=True)
        salt = request["kw"].get("cache_salt")
        expected = {rank: oracle.cached_tokens(request["prompt_token_ids"], salt) for rank, oracle in replay.oracles.items()}
        pods = replay.score(request).pods
        assert len(pods) == bool(expected)
        if pods:
            assert pods[0].predicted_by_rank == expected, request["tag"]
            assert pods[0].predicted_cached_tokens == max(expected.values())
        compared += 1
        hits += any(expected.values())
    assert compared >= 10
    assert hits >= 3


@pytest.mark.parametrize("name", ["offload-cpu-placeholder-events", "offload-tiering-fs"])
def test_predictions_equal_the_engines_cached_tokens_metric_until_a_silent_reset(name: str) -> None:
    """The offload captures hold the engine's counters. A reset of its lower tiers is never announced: they count till then."""
    replay = Replay([name])
    predicted, compared = None, 0
    for line in (CAPTURES / f"{name}.requests.jsonl").read_text().splitlines():
        request = json.loads(line)
        if "full reset" in request["tag"]:
            break
        replay.feed(request["t"])
        if "prompt_token_ids" in request:
            pods = replay.score(request).pods
            predicted = pods[0].predicted_cached_tokens if pods else 0
        elif "delta" in request:
            assert predicted == request["delta"].get("vllm:prompt_tokens_cached_total{}", 0), request["tag"]
            compared += 1
    assert compared == 9


@pytest.mark.parametrize("name", [name.removesuffix(".replay.bin") for name in ALL if name.endswith(".replay.bin")])
def test_a_replay_leads_to_the_same_index_as_the_live_frames(name: str) -> None:
    live, replayed = Replay([name]), Replay([f"{name}.replay"])
    replayed.feed(float("inf"))
    live._frames = live._frames[: len(replayed._frames)]
    live.feed(float("inf"))
    assert replayed.report == live.report
    one, other = replayed.indexer.index, live.indexer.index
    assert (one.stats(), one.streams()) == (other.stats(), other.streams())
