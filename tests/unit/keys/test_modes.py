"""keys.mode, from settings to answers, on every core."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec
import pytest

from kvatlas.config import Config, EngineHashSettings, IndexSettings, KeySettings, load_config
from kvatlas.errors import ConfigError, RequestError
from kvatlas.indexer import Indexer
from kvatlas.keys import EngineKeys, HashScheme, LlmdKeys
from kvatlas.results import Query
from kvatlas.types import BlockKey, BlockStored, EngineHash, EventBatch, Extra, MultimodalItem, PodId, Stream
from tests.contract.implementations import IMPLEMENTATIONS

SCHEME = HashScheme("xxhash_cbor", "42")
LORAS = {"sql": "/loras/sql"}
KEYS = EngineKeys(SCHEME, 4, LORAS)
TOKENS = list(range(50, 61))
SETTINGS = KeySettings(mode="engine", block_size=4, engine=EngineHashSettings(algorithm="xxhash_cbor", seed="42", loras=LORAS))

cores = pytest.mark.parametrize("core", IMPLEMENTATIONS)


def indexer(core: str, keys: KeySettings = SETTINGS) -> Indexer:
    return Indexer(Config(keys=keys, index=IndexSettings(core=core), models={"short": "m"}))  # type: ignore[arg-type]


def hashes(keys: Sequence[BlockKey]) -> tuple[EngineHash, ...]:
    return tuple(map(EngineHash, keys))


def filled(core: str) -> Indexer:
    """Three engines that hold one prompt: of model m, of another one, and of one that is not known. All hashes are equal."""
    found = indexer(core)
    for pod, model in (("mine", "m"), ("other", "n"), ("unknown", None)):
        event = BlockStored(hashes(KEYS.keys(array("I", TOKENS), "any")))
        found.index.apply(Stream(PodId(pod)), EventBatch((event,), model=model))
    return found


def matched(found: Indexer, model: str, scorer: str | None = None, **what: object) -> dict[str, int]:
    query = Query(TOKENS, model, scorer=scorer, **what)  # type: ignore[arg-type]
    return {pod.pod: pod.matched_blocks for pod in found.score(query).pods}


@cores
@pytest.mark.parametrize("model", ["m", "short"])
def test_a_stream_of_another_model_is_no_candidate_though_it_holds_every_hash(core: str, model: str) -> None:
    found = filled(core)
    assert matched(found, model) == {"mine": 2, "unknown": 2}
    assert matched(found, "x") == {"unknown": 2}


@cores
def test_what_only_other_models_hold_counts_as_held_by_nobody(core: str) -> None:
    found = filled(core)
    found.index.drop(Stream(PodId("mine")))
    found.index.forget(Stream(PodId("unknown")))
    result = found.score(Query(TOKENS, "m"))
    assert (result.cache_hits, result.coverage) == (0, 0.0)
    assert [(pod.pod, pod.score) for pod in result.pods] == [("mine", 0.0)]


@cores
def test_a_promise_to_a_stream_of_another_model_is_none(core: str) -> None:
    found = indexer(core)
    other = Stream(PodId("other"))
    found.index.apply(other, EventBatch((), model="n"))
    for stream in (other, Stream(PodId("stranger"))):
        found.promise(Query(TOKENS, "m"), stream)
    assert matched(found, "m") == {"stranger": 2}


@cores
def test_an_adapter_is_found_by_its_model_and_by_its_own_name(core: str) -> None:
    found = filled(core)
    keys = KEYS.keys(array("I", TOKENS), "m", lora_name="sql")
    for pod in ("mine", "other"):
        found.index.apply(Stream(PodId(pod)), EventBatch((BlockStored(hashes(keys[:1])),)))
    assert matched(found, "m", lora_name="sql") == {"mine": 1, "unknown": 0}
    assert matched(found, "sql") == {"mine": 1, "other": 1, "unknown": 0}
    with pytest.raises(RequestError, match="lora_name"):
        matched(found, "m", lora_name="french")


@cores
def test_a_scorer_from_elsewhere_sees_the_same_candidates(core: str) -> None:
    class Longest:
        def score(self, holdings: object, stream: object, hit: object) -> float:
            return float(len(hit.tiers))  # type: ignore[attr-defined]

    found = filled(core)
    found._scorers["own"] = Longest()  # type: ignore[assignment]
    assert matched(found, "m", "own") == {"mine": 2, "unknown": 2}


@cores
def test_an_image_is_found_where_the_engine_hashed_it(core: str) -> None:
    found = indexer(core)
    one = SCHEME.block_hash(SCHEME.none_hash(), TOKENS[:4], [("mm", "cafe", 2)])
    two = SCHEME.block_hash(one, TOKENS[4:8], [("mm", "cafe", -2)])
    names = tuple(EngineHash(int.from_bytes(digest[-8:], "big")) for digest in (one, two))
    found.index.apply(Stream(PodId("mine")), EventBatch((BlockStored(names),), model="m"))
    assert matched(found, "m", multimodal=(MultimodalItem("cafe", 2, 4),)) == {"mine": 2}
    assert matched(found, "m", multimodal=(MultimodalItem("cafe", 2, 2),)) == {"mine": 1}
    assert matched(found, "m") == {"mine": 0}
    with pytest.raises(RequestError, match=r"multimodal\[0\]\.length_tokens"):
        matched(found, "m", multimodal=(MultimodalItem("cafe", 2),))


@cores
@pytest.mark.parametrize("mode", ["llmd-cbor-fnv", "llmd-xxh64"])
def test_llmds_keys_are_made_of_events_and_of_prompts(core: str, mode: str) -> None:
    found = indexer(core, KeySettings(mode=mode, block_size=4, seed="7"))  # type: ignore[arg-type]
    item = MultimodalItem("cafe", 2, 4)
    extras = ((Extra(2, "mm", b"cafe"), Extra(0, "salt", b"s")), (Extra(-2, "mm", b"cafe"),))
    event = BlockStored((EngineHash(1), EngineHash(2)), None, array("I", TOKENS[:8]), 4, extras=extras)
    found.index.apply(Stream(PodId("mine")), EventBatch((event,), model="m"))
    assert matched(found, "m", cache_salt="s", multimodal=(item,)) == {"mine": 2}
    assert matched(found, "m", multimodal=(item,)) == {"mine": 0}
    assert matched(found, "m", cache_salt="s") == {"mine": 0}
    keys = LlmdKeys(4, "7", mode).keys(array("I", TOKENS), "m", cache_salt="s", multimodal=[item])  # type: ignore[arg-type]
    query = Query(TOKENS, "m", cache_salt="s", multimodal=(item,))
    assert found.block_keys(query) == keys
    assert all(block.holders for block in found.locality(keys))


# -- settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "path", "problem"),
    [
        (["keys.mode=engine", "keys.engine.algorithm=xxhash"], "keys.engine.seed", "random"),
        (["keys.mode=engine", "keys.engine.algorithm=xxhash_cbor"], "keys.engine.seed", "random"),
        (["keys.mode=engine", "keys.engine.algorithm=sha256_cbor_64bit"], "keys.engine.seed", "random"),
        (["keys.mode=engine", "keys.seed=1"], "keys.seed", "nothing"),
        (["keys.engine.seed=1"], "keys.engine", "keys.mode is kvatlas"),
        (["keys.mode=llmd-xxh64", "keys.engine.algorithm=xxhash"], "keys.engine", "keys.mode is llmd-xxh64"),
        (["keys.mode=engine", "keys.engine.loras={a: ''}"], "keys.engine.loras.a", "empty"),
        (
            [
                "keys.mode=engine",
                "keys.engine.algorithm=sha256_cbor_64bit",
                "keys.engine.seed=0",
                "keys.engine.loras={a: /path}",
            ],
            "keys.engine.loras.a",
            "number",
        ),
        (["keys.mode=own"], "keys.mode", "own"),
        (["keys.mode=engine", "keys.engine.algorithm=md5"], "keys.engine.algorithm", "md5"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], path: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        load_config(environ={}, overrides=overrides)
    assert refused.value.path == path


def test_an_indexer_refuses_them_too() -> None:
    keys = KeySettings(mode="engine", engine=EngineHashSettings(algorithm="xxhash"))
    with pytest.raises(ConfigError, match=r"keys\.engine\.seed"):
        Indexer(Config(keys=keys))


def test_without_a_seed_sha256_is_vllms_default() -> None:
    keys = load_config(environ={}, overrides=["keys.mode=engine"]).keys
    found = Indexer(msgspec.structs.replace(Config(), keys=keys)).schema
    assert found == EngineKeys(HashScheme("sha256", "vllm-none-hash"), 16)
