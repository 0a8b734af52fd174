"""Keys that are engine hashes: what a real vLLM 0.32 called its blocks, computed from tokens alone."""

from __future__ import annotations

import ast
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvatlas.config import Config, EngineHashSettings, KeySettings
from kvatlas.indexer import Indexer
from kvatlas.ingest.decode.vllm import VllmDecoder
from kvatlas.ingest.recording import read_frames
from kvatlas.ingest.topic import parse_topic
from kvatlas.keys import EngineKeys, HashScheme
from kvatlas.keys.engine_hashes import UNSET_SEED
from kvatlas.results import Query
from kvatlas.types import ApplyReport, BlockStored, DpRank, Event, MultimodalItem, Stream
from tests.contract.implementations import IMPLEMENTATIONS
from tests.golden.test_captures_predict import WITH_TRUTH, requests_of
from tests.models.oracle import HashOracle

DATA = Path(__file__).parents[1] / "data" / "vllm-0.32"
VECTORS: list[dict[str, Any]] = json.loads((DATA / "hash_vectors.json").read_text())
BLOCK_TOKENS = 32
SCHEMES = {"base-xxhash_cbor-seed42": HashScheme("xxhash_cbor", "42")}
DEFAULT = HashScheme("sha256_cbor", UNSET_SEED)
"""How the recorded engines hashed: all the others were started with sha256_cbor, and without PYTHONHASHSEED."""
BASES = ["base-sha256_cbor", "base-sha256_cbor-raw-bytes-hashes", "base-xxhash_cbor-seed42"]
ALL = sorted(path.name.removesuffix(".bin") for path in DATA.glob("*.bin") if ".replay" not in path.name)


def scheme_of(capture: str) -> HashScheme:
    return SCHEMES.get(capture, DEFAULT)


# -- vLLM's own functions -------------------------------------------------------------------------------------------------


def asked(vector: dict[str, Any]) -> dict[str, Any]:
    """What a prompt says that has these extra keys in its first block. Embeddings cannot be asked for."""
    extra = ast.literal_eval(vector["extra_keys"]) or ()
    said: dict[str, Any] = {"model": "m", "multimodal": []}
    for tag, *rest in extra:
        if tag == "lora":
            said["lora_name"] = rest[0]
        elif tag == "cache_salt":
            said["cache_salt"] = rest[0]
        else:
            said["multimodal"].append(MultimodalItem(rest[0], rest[1], 6))
    return said


def loras(vector: dict[str, Any]) -> dict[str, str]:
    return {key[1]: key[2] for key in ast.literal_eval(vector["extra_keys"]) or () if key[0] == "lora"}


@pytest.mark.parametrize("natively", [True, False], ids=["native", "python"])
@pytest.mark.parametrize(
    "vector",
    [vector for vector in VECTORS if vector["extra"] in ("none", "salt")],
    ids=lambda vector: f"{vector['algo']}-{vector['seed']}-{vector['extra']}",
)
def test_keys_of_a_prompt_are_vllms_own_hashes(vector: dict[str, Any], natively: bool) -> None:
    keys = EngineKeys(HashScheme(vector["algo"], vector["seed"] or UNSET_SEED), 16, natively=natively)
    tokens = array("I", vector["block1"] + vector["block2"] + [1])
    assert keys.keys(tokens, **asked(vector)) == [vector["ext1"], vector["ext2"]]


@pytest.mark.parametrize(
    "vector",
    [vector for vector in VECTORS if vector["algo"] in ("sha256_cbor", "xxhash_cbor")],
    ids=lambda vector: f"{vector['algo']}-{vector['seed']}-{vector['extra']}",
)
def test_rust_computes_vllms_own_hashes(vector: dict[str, Any]) -> None:
    """With all kinds of extra keys, those that a prompt cannot have included."""
    native = pytest.importorskip("kvatlas._native", reason="the native core is not built")
    scheme = HashScheme(vector["algo"], vector["seed"] or UNSET_SEED)
    extra_keys = ast.literal_eval(vector["extra_keys"]) or ()
    extras = [(0, scheme.serialized(extra_keys))] if extra_keys else []
    tokens = array("I", vector["block1"] + vector["block2"])
    root = bytes.fromhex(vector["none_hash"])
    assert array("Q", native.block_keys(scheme.algorithm, root, tokens, 16, extras)).tolist() == [
        vector["ext1"],
        vector["ext2"],
    ]


@pytest.mark.parametrize(
    "vector",
    [vector for vector in VECTORS if vector["extra"] == "lora+mm+salt"],
    ids=lambda vector: f"{vector['algo']}-{vector['seed']}",
)
def test_adapter_item_and_salt_are_hashed_as_vllm_does(vector: dict[str, Any]) -> None:
    """The adapter is hashed into every block: vLLM's functions were asked for the second one without it, so only the first
    is compared."""
    keys = EngineKeys(HashScheme(vector["algo"], vector["seed"] or UNSET_SEED), 16, loras(vector))
    tokens = array("I", vector["block1"])
    assert keys.keys(tokens, **asked(vector)) == keys.in_python().keys(tokens, **asked(vector)) == [vector["ext1"]]


# -- recorded engines -----------------------------------------------------------------------------------------------------


def events_of(*captures: str) -> Iterator[tuple[float, Stream, str | None, Event]]:
    frames = [frame for name in captures for frame in read_frames(DATA / f"{name}.bin")]
    for frame in sorted(frames, key=lambda frame: frame.received_ns):
        pod, model = parse_topic(frame.topic)
        assert pod is not None
        for batch in VllmDecoder().decode(frame.payload).batches:
            for event in batch.events:
                yield frame.received_ns / 1e9, Stream(pod, batch.dp_rank or DpRank(0)), model, event


@pytest.mark.parametrize("natively", [True, False], ids=["native", "python"])
@pytest.mark.parametrize("capture", ALL)
def test_every_recorded_hash_is_computed_from_tokens(capture: str, natively: bool) -> None:
    """Sliding windows list only some of an event's blocks, in their order."""
    keys = EngineKeys(scheme_of(capture), BLOCK_TOKENS, natively=natively)
    prefixes: dict[int, tuple[array[int], str | None]] = {}
    announced: set[int] = set()
    for _, _, _, event in events_of(capture):
        if not isinstance(event, BlockStored) or not event.token_ids:
            continue
        assert event.lora_name is None, "no recorded engine has adapters"
        announced.update(event.hashes)
        if event.parent is not None and event.parent not in prefixes:
            continue
        before, salt = prefixes.get(event.parent, (array("I"), None)) if event.parent is not None else (array("I"), None)
        if event.parent is None and event.extras:
            salt = next((extra.value.decode() for extra in event.extras[0] if extra.kind == "salt"), None)
        tokens = before + event.token_ids
        found = keys.keys(tokens, "tiny", cache_salt=salt)
        numbers = {hash_: number for number, hash_ in enumerate(found)}
        first = len(before) // BLOCK_TOKENS
        places = [numbers.get(block, -1) for block in event.hashes]
        assert all(place >= first for place in places)
        assert places == sorted(set(places))
        for block in event.hashes:
            prefixes[block] = tokens[: (numbers[block] + 1) * BLOCK_TOKENS], salt
    assert prefixes.keys() == announced
    assert len(announced) >= 8


class Replay:
    """Feeds recordings to an index whose keys are engine hashes."""

    def __init__(self, captures: list[str], core: str, *, stripped: bool) -> None:
        scheme = scheme_of(captures[0])
        seed = None if scheme.seed == UNSET_SEED else scheme.seed
        engine = EngineHashSettings(algorithm=scheme.algorithm, seed=seed)
        keys = KeySettings(mode="engine", block_size=BLOCK_TOKENS, engine=engine)
        config = msgspec.structs.replace(Config(), keys=keys)
        self.indexer = Indexer(msgspec.structs.replace(config, index=msgspec.structs.replace(config.index, core=core)))
        self.report = ApplyReport()
        self._frames = sorted(
            (frame for name in captures for frame in read_frames(DATA / f"{name}.bin")), key=lambda frame: frame.received_ns
        )
        self._stripped = stripped
        self.oracles: dict[DpRank, HashOracle] = {}

    def feed(self, until_s: float) -> None:
        while self._frames and self._frames[0].received_ns / 1e9 < until_s:
            frame = self._frames.pop(0)
            pod, model = parse_topic(frame.topic)
            assert pod is not None
            for batch in VllmDecoder().decode(frame.payload).batches:
                rank = batch.dp_rank or DpRank(0)
                events = tuple(map(without_tokens, batch.events)) if self._stripped else batch.events
                said = msgspec.structs.replace(batch, model=model, events=events)
                self.report.add(self.indexer.index.apply(Stream(pod, rank), said))
                self.oracles.setdefault(rank, HashOracle()).feed(frame.payload)


def without_tokens(event: Event) -> Event:
    """Return an event as a placeholder: hashes, and what tells groups apart."""
    if not isinstance(event, BlockStored):
        return event
    return msgspec.structs.replace(event, parent=None, token_ids=array("I"), block_size_tokens=None, extras=None)


cores = pytest.mark.parametrize("core", IMPLEMENTATIONS)


@cores
@pytest.mark.parametrize("stripped", [False, True], ids=["whole events", "placeholders"])
@pytest.mark.parametrize("name", WITH_TRUTH)
def test_predictions_equal_the_engines_cached_tokens(name: str, core: str, stripped: bool) -> None:
    """As often as with our own keys: for every request but the first after a reset. And without a token in any event."""
    replay = Replay([name], core, stripped=stripped)
    compared = 0
    for request, after_reset in requests_of(name):
        replay.feed(request["t"])
        truth = request["usage"]["prompt_tokens_details"]["cached_tokens"]
        pods = replay.indexer.score(Query(request["prompt_token_ids"], "tiny", cache_salt=request["kw"].get("cache_salt"))).pods
        if not after_reset:
            assert (pods[0].predicted_cached_tokens if pods else 0) == truth, request["tag"]
            compared += 1
    assert compared >= 16
    assert (replay.report.orphaned, replay.report.refused, replay.report.removed_unknown) == (0, 0, 0)


@cores
@pytest.mark.parametrize("stripped", [False, True], ids=["whole events", "placeholders"])
@pytest.mark.parametrize("name", ["offload-cpu-placeholder-events", "offload-tiering-fs", "dp2-rank0", *BASES])
def test_predictions_equal_an_oracle_of_engine_hashes(name: str, core: str, stripped: bool) -> None:
    replay = Replay(["dp2-rank0", "dp2-rank1"] if name == "dp2-rank0" else [name], core, stripped=stripped)
    hits = 0
    for request, _ in requests_of(name):
        replay.feed(request["t"])
        salt = request["kw"].get("cache_salt")
        expected = {rank: oracle.cached_tokens(request["prompt_token_ids"], salt) for rank, oracle in replay.oracles.items()}
        pods = replay.indexer.score(Query(request["prompt_token_ids"], request.get("model", "tiny"), cache_salt=salt)).pods
        if pods:
            assert pods[0].predicted_by_rank == expected, request["tag"]
        hits += any(expected.values())
    assert hits >= 3
    assert (replay.report.orphaned, replay.report.refused) == (0, 0)
