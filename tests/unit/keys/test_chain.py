"""Block keys: stable bytes, chained, the same however the tokens are cut."""

from __future__ import annotations

import struct
from array import array

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.keys import KeySchema
from kvatlas.types import Extra, MultimodalItem

TOKENS = array("I", range(1, 33))


def test_keys_are_the_documented_bytes_hashed() -> None:
    root = xxhash.xxh3_64_intdigest(b"kvatlas/1" + struct.pack("<I", 2) + b"42" + b"llama")
    first = xxhash.xxh3_64_intdigest(struct.pack("<Q16I", root, *range(1, 17)))
    extra = struct.pack("<II", 3, 2) + b"mm" + struct.pack("<I", 4) + b"cafe"
    second = xxhash.xxh3_64_intdigest(struct.pack("<Q16I", first, *range(17, 33)) + extra)
    keys = KeySchema(16, "42").keys(TOKENS, "llama", multimodal=[MultimodalItem("cafe", 19)])
    assert keys == [first, second]


def test_keys_stay_what_they_were() -> None:
    """Replicas of different versions share keys: these values never change."""
    assert KeySchema(16).keys(TOKENS, "test-model") == [10502497660344753534, 3607308203239243331]
    assert KeySchema(16, "42").keys(TOKENS, "test-model", cache_salt="s") == [4743001664067074316, 7428418284244951907]


def test_a_partial_last_block_has_no_key() -> None:
    schema = KeySchema(16)
    assert len(schema.keys(TOKENS[:15], "m")) == 0
    assert schema.keys(TOKENS[:31], "m") == schema.keys(TOKENS, "m")[:1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"model": "a"}, {"model": "b"}),
        ({"model": "a"}, {"model": "a", "lora_name": "b"}),
        ({"model": "a"}, {"model": "a", "cache_salt": "s"}),
        ({"model": "a", "cache_salt": "s"}, {"model": "a", "cache_salt": "t"}),
        ({"model": "a"}, {"model": "a", "multimodal": [MultimodalItem("x", 0)]}),
        ({"model": "a", "multimodal": [MultimodalItem("x", 0)]}, {"model": "a", "multimodal": [MultimodalItem("y", 0)]}),
        ({"model": "a", "multimodal": [MultimodalItem("x", 0)]}, {"model": "a", "multimodal": [MultimodalItem("x", 1)]}),
        ({"model": "a", "multimodal": [MultimodalItem("s", 0)]}, {"model": "a", "cache_salt": "s"}),
    ],
)
def test_what_differs_in_the_first_block_shares_no_key(first: dict, second: dict) -> None:
    schema = KeySchema(16)
    assert not set(schema.keys(TOKENS, **first)) & set(schema.keys(TOKENS, **second))


def test_an_adapter_stands_in_for_its_model_and_an_empty_salt_is_none() -> None:
    schema = KeySchema(16)
    assert schema.keys(TOKENS, "base", lora_name="adapter") == schema.keys(TOKENS, "adapter")
    assert schema.keys(TOKENS, "base", cache_salt="") == schema.keys(TOKENS, "base")


def test_an_item_counts_in_the_block_where_it_starts() -> None:
    """An image that starts in block 1 leaves block 0's key alone; later blocks inherit it."""
    schema = KeySchema(16)
    plain = schema.keys(array("I", range(48)), "m")
    with_image = schema.keys(array("I", range(48)), "m", multimodal=[MultimodalItem("x", 20)])
    assert with_image[0] == plain[0]
    assert with_image[1] != plain[1]
    assert with_image[2] != plain[2]


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=200),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    size=st.integers(1, 40),
    items=st.lists(st.tuples(st.integers(0, 199), st.sampled_from(["a", "b"])), max_size=4),
)
def test_however_an_engine_cuts_the_tokens_the_keys_are_the_same(
    tokens: list[int], cuts: list[int], size: int, items: list[tuple[int, str]]
) -> None:
    schema = KeySchema(size)
    whole = array("I", tokens)
    extras = [Extra(offset, "mm", name.encode()) for offset, name in items if offset < len(tokens)]
    expected, _ = schema.extend(schema.root("m"), whole, extras)
    end, keys, start, i = schema.root("m"), [], 0, 0
    while start < len(tokens):
        cut = cuts[i % len(cuts)]
        here = [Extra(extra.offset_tokens - start, extra.kind, extra.value) for extra in extras]
        here = [extra for extra in here if extra.offset_tokens < cut]
        more, end = schema.extend(end, whole[start : start + cut], here)
        keys += more
        start, i = start + cut, i + 1
    assert keys == expected


def test_names_that_are_no_unicode_text_still_have_keys() -> None:
    assert len(KeySchema(16).keys(TOKENS, "m\ud800", cache_salt="\udfff")) == 2


@pytest.mark.parametrize("offset", [-5, 32, 1 << 30])
def test_an_item_that_starts_in_no_block_here_belongs_to_none(offset: int) -> None:
    """A hostile engine cannot make a chain carry items along for ever."""
    schema = KeySchema(16)
    keys, end = schema.extend(schema.root("m"), TOKENS, [Extra(offset, "mm", b"x")])
    assert keys == schema.keys(TOKENS, "m")
    assert end.extras == ()
