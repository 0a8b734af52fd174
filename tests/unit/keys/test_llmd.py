"""llm-d's keys: their golden values, and what belongs to a block beside its tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.errors import RequestError
from kvatlas.keys import LlmdKeys
from kvatlas.keys.cbor import cbor
from kvatlas.keys.llmd import LlmdMode
from kvatlas.types import Extra, MultimodalItem

TOKENS = array("I", range(1, 33))
MODES: list[LlmdMode] = ["llmd-cbor-fnv", "llmd-xxh64"]
modes = pytest.mark.parametrize("mode", MODES)
GOLDEN = [
    ("llmd-cbor-fnv", "", [9540012594951042066, 16921089685996993662]),
    ("llmd-cbor-fnv", "42", [3239622172847516705, 18365376266021390534]),
    ("llmd-xxh64", "", [13553460584553255540, 9887990258693334188]),
]


@pytest.mark.parametrize(("mode", "seed", "expected"), GOLDEN)
def test_golden_keys(mode: LlmdMode, seed: str, expected: list[int]) -> None:
    keys = LlmdKeys(16, seed, mode)
    assert keys.keys(TOKENS, "test-model") == keys.in_python().keys(TOKENS, "test-model") == expected
    assert keys.extend(keys.root("test-model"), TOKENS)[0] == expected


def test_the_key_of_their_end_to_end_test() -> None:
    tokens = array("I", [8197, 438, 322, 18926, 432, 45600, 49])
    assert LlmdKeys(4).keys(tokens, "ibm-granite/granite-3.1-8b-instruct") == [1334984470577408192]


def test_an_item_is_a_map_of_its_hash() -> None:
    """Go's ``[]MMHash{{Hash: "a"}}`` in canonical CBOR."""
    assert cbor(({"Hash": "a"},)).hex() == "81a16448617368" + "6161"


@modes
def test_a_salt_an_adapter_and_an_item_make_other_keys(mode: LlmdMode) -> None:
    keys = LlmdKeys(16, "", mode)
    plain = keys.keys(TOKENS, "m")
    salted = keys.keys(TOKENS, "m", cache_salt="s")
    assert not set(salted) & set(plain), "a salt isolates: later blocks inherit it"
    assert keys.keys(TOKENS, "m", lora_name="x") == keys.keys(TOKENS, "x")
    second = keys.keys(TOKENS, "m", multimodal=[MultimodalItem("i", 20, 3)])
    assert second[0] == plain[0]
    assert second[1] != plain[1]
    both = keys.keys(TOKENS, "m", multimodal=[MultimodalItem("i", 15, 2)])
    assert not set(both) & set(plain)


@modes
def test_an_item_needs_a_length(mode: LlmdMode) -> None:
    with pytest.raises(RequestError, match=r"multimodal\[1\]\.length_tokens"):
        LlmdKeys(16, "", mode).keys(TOKENS, "m", multimodal=[MultimodalItem("i", 0, 1), MultimodalItem("j", 4)])


@modes
def test_items_do_not_overlap(mode: LlmdMode) -> None:
    with pytest.raises(RequestError, match=r"multimodal\[0\]\.offset_tokens"):
        LlmdKeys(16, "", mode).keys(TOKENS, "m", multimodal=[MultimodalItem("i", 4, 5), MultimodalItem("j", 0, 5)])


def as_engine_says(items: Sequence[MultimodalItem], salt: str | None, block: int, size: int) -> list[Extra]:
    """What vLLM's event says of one of its blocks."""
    start, end = block * size, (block + 1) * size
    extras = [
        Extra(item.offset_tokens - start, "mm", item.hash.encode())
        for item in items
        if item.offset_tokens < end and start < item.offset_tokens + (item.length_tokens or 0)
    ]
    if salt and block == 0:
        extras.append(Extra(0, "salt", salt.encode()))
    return extras


ITEMS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), max_size=4).map(
    lambda gaps: [
        MultimodalItem(f"item {i}", sum(gap + length for gap, length in gaps[:i]) + gap, length)
        for i, (gap, length) in enumerate(gaps)
    ]
)


@modes
@pytest.mark.parametrize(("engine_size", "index_size"), [(4, 4), (2, 4), (1, 6), (4, 12)])
@given(items=ITEMS, salt=st.sampled_from([None, "s"]), length=st.integers(0, 60))
def test_events_and_prompts_have_the_same_keys(
    mode: LlmdMode, engine_size: int, index_size: int, items: list[MultimodalItem], salt: str | None, length: int
) -> None:
    """Where engine blocks are no larger than the index's."""
    keys = LlmdKeys(index_size, "", mode)
    tokens = array("I", range(length - length % engine_size))
    end = keys.root("m")
    found: list[int] = []
    for block in range(len(tokens) // engine_size):
        part = tokens[block * engine_size : (block + 1) * engine_size]
        more, end = keys.extend(end, part, as_engine_says(items, salt, block, engine_size))
        found += more
    assert found == keys.keys(tokens, "m", cache_salt=salt, multimodal=items)


@modes
def test_in_a_larger_engine_block_an_item_counts_from_its_start_on(mode: LlmdMode) -> None:
    keys = LlmdKeys(4, "", mode)
    tokens = array("I", range(12))
    found, _ = keys.extend(keys.root("m"), tokens, [Extra(5, "mm", b"i")])
    assert found == keys.keys(tokens, "m", multimodal=[MultimodalItem("i", 5, 7)])


@modes
def test_what_is_no_item_is_part_of_its_own_block_only(mode: LlmdMode) -> None:
    keys = LlmdKeys(4, "", mode)
    plain = keys.extend(keys.root("m"), TOKENS[:12])[0]
    other = keys.extend(keys.root("m"), TOKENS[:12], [Extra(4, "opaque", b"\xff\x00")])[0]
    assert other[0] == plain[0]
    assert other[1] != plain[1]
    behind = keys.extend(keys.root("m"), TOKENS[:12], [Extra(12, "mm", b"i"), Extra(-1, "salt", b"s")])[0]
    assert behind == plain


@modes
@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=40),
    size=st.integers(1, 9),
    seed=st.text(max_size=5),
    model=st.text(max_size=300),
    salt=st.text(max_size=30) | st.none(),
    items=ITEMS,
)
def test_rust_and_python_agree(
    mode: LlmdMode, tokens: list[int], size: int, seed: str, model: str, salt: str | None, items: list[MultimodalItem]
) -> None:
    keys = LlmdKeys(size, seed, mode)
    asked = {"cache_salt": salt, "multimodal": items}
    assert keys.keys(array("I", tokens), model, **asked) == keys.in_python().keys(array("I", tokens), model, **asked)
