"""Keys that are engine hashes, of prompts. Those of recorded engines are in tests/golden."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.config.settings import RANDOM_WITHOUT_SEED
from kvatlas.errors import RequestError
from kvatlas.keys import EngineKeys, HashScheme
from kvatlas.keys.engine_hashes import ALGORITHMS, random_without_seed
from kvatlas.types import MultimodalItem
from tests.unit.keys.test_llmd import ITEMS

TOKENS = array("I", range(100, 113))
CBOR = [algorithm for algorithm in ALGORITHMS if "cbor" in algorithm]
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def test_settings_and_hashes_agree_on_what_needs_a_seed() -> None:
    assert {algorithm for algorithm in ALGORITHMS if random_without_seed(algorithm)} == set(RANDOM_WITHOUT_SEED)


@algorithms
def test_an_item_is_hashed_into_every_block_that_it_touches(algorithm: str) -> None:
    scheme = HashScheme(algorithm, "0")
    keys = EngineKeys(scheme, 4, {"sql": "7"})
    items = [MultimodalItem("b", 7, 3), MultimodalItem("a", 1, 3)]
    one = scheme.block_hash(scheme.none_hash(), TOKENS[:4], [("lora", "sql", "7"), ("mm", "a", 1), ("cache_salt", "s")])
    two = scheme.block_hash(one, TOKENS[4:8], [("lora", "sql", "7"), ("mm", "b", 3)])
    three = scheme.block_hash(two, TOKENS[8:12], [("lora", "sql", "7"), ("mm", "b", -1)])
    expected = [int.from_bytes(digest[-8:], "big") for digest in (one, two, three)]
    for ask in (keys.keys, keys.in_python().keys):
        assert ask(TOKENS, "m", lora_name="sql", cache_salt="s", multimodal=items) == expected
        assert ask(TOKENS, "sql", cache_salt="s", multimodal=items) == expected, "an adapter asked for as a model"


def test_the_model_is_not_hashed_and_so_confines() -> None:
    keys = EngineKeys(HashScheme("sha256_cbor", "0"), 4, {"sql": "/l/sql"})
    assert keys.keys(TOKENS, "m") == keys.keys(TOKENS, "other")
    assert keys.confines("m", None)
    assert keys.confines("m", "sql")
    assert not keys.confines("sql", None)
    assert not keys.confines("sql", "sql")


def test_an_adapter_without_a_path_is_refused() -> None:
    with pytest.raises(RequestError, match=r"lora_name: 'x'.*keys\.engine\.loras"):
        EngineKeys(HashScheme("sha256_cbor", "0"), 4).keys(TOKENS, "m", lora_name="x")


def test_an_item_without_a_length_is_refused() -> None:
    with pytest.raises(RequestError, match=r"multimodal\[0\]\.length_tokens"):
        EngineKeys(HashScheme("sha256_cbor", "0"), 4).keys(TOKENS, "m", multimodal=[MultimodalItem("i", 0)])


@pytest.mark.parametrize("algorithm", CBOR)
@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=40),
    size=st.integers(1, 9),
    seed=st.text(max_size=40),
    salt=st.text(max_size=300) | st.none(),
    lora=st.sampled_from([None, "a", "b"]),
    items=ITEMS,
)
def test_rust_and_python_agree(
    algorithm: str,
    tokens: list[int],
    size: int,
    seed: str,
    salt: str | None,
    lora: str | None,
    items: list[MultimodalItem],
) -> None:
    keys = EngineKeys(HashScheme(algorithm, seed), size, {"a": "1", "b": "70000"})
    asked: dict[str, Any] = {"lora_name": lora, "cache_salt": salt, "multimodal": items}
    assert keys.keys(array("I", tokens), "m", **asked) == keys.in_python().keys(array("I", tokens), "m", **asked)


# -- vLLM 0.10 ------------------------------------------------------------------------------------------------------------


def vllm_0_10(prompt: Sequence[int], size: int, seed: str, extras: dict[int, tuple[object, ...]]) -> list[int]:
    """``sha256_cbor_64bit`` as vLLM's pull request 20511 defines it, with the package that it uses."""

    def hashed(value: object) -> int:
        return int.from_bytes(hashlib.sha256(cbor2.dumps(value, canonical=True)).digest(), "big") & (1 << 64) - 1

    parent = hashed(seed)
    hashes = []
    for block in range(len(prompt) // size):
        parent = hashed((parent, tuple(prompt[block * size : (block + 1) * size]), extras.get(block)))
        hashes.append(parent)
    return hashes


@given(
    prompt=st.lists(st.integers(0, 2**32 - 1), max_size=40),
    seed=st.text(max_size=10),
    salt=st.text(min_size=1, max_size=10) | st.none(),
)
def test_64_bit_hashes_are_those_of_vllm_0_10(prompt: list[int], seed: str, salt: str | None) -> None:
    keys = EngineKeys(HashScheme("sha256_cbor_64bit", seed), 4, {"sql": "3"})
    items = [MultimodalItem("image", 2, 4)]
    expected = vllm_0_10(prompt, 4, seed, {} if salt is None else {0: (salt,)})
    assert keys.keys(array("I", prompt), "m", cache_salt=salt) == expected
    tagless: dict[int, tuple[object, ...]] = dict.fromkeys(range(10), (3,))
    tagless |= {0: (3, "image", *([salt] if salt else [])), 1: (3, "image")}
    asked = keys.keys(array("I", prompt), "m", lora_name="sql", cache_salt=salt, multimodal=items)
    assert asked == vllm_0_10(prompt, 4, seed, tagless)
