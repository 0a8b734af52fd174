"""What routing history is kept by: llm-d's chain over blocks of tokens, or of text."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.prefix.hashes import HashedPrompt, hash_prompt
from kvatlas.route.request import RouteRequest
from kvatlas.types import MultimodalItem

SIZE = 64


def hashed(blocks_max: int | None = None, **fields: Any) -> HashedPrompt:
    if isinstance(fields.get("token_ids"), list | range):
        fields["token_ids"] = array("I", fields["token_ids"])
    found = hash_prompt(RouteRequest(id="r", **{"model": "m", **fields}), SIZE, blocks_max)
    assert found is not None
    return found


def test_the_chain_is_the_one_of_the_specification() -> None:
    tokens = array("I", range(150))
    last = xxhash.xxh64_intdigest(b"msalt")
    expected = []
    for start in (0, 64, 128):
        content = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + SIZE])
        own = xxhash.xxh64_intdigest(content)
        last = xxhash.xxh64_intdigest(own.to_bytes(8, "little") + last.to_bytes(8, "little"))
        expected.append(last)
    assert hashed(token_ids=tokens, cache_salt="salt").hashes.tolist() == expected


def test_golden_hashes_stay_what_they_are() -> None:
    """Computed with another implementation of XXH64."""
    assert hashed(token_ids=range(100)).hashes.tolist() == [0x9504D79D090C075D, 0xCC86BA0A8F86AD9F]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=400), st.lists(st.integers(0, 3), min_size=1, max_size=400))
def test_prompts_share_as_many_hashes_as_whole_blocks_or_all_where_they_are_equal(one: list[int], other: list[int]) -> None:
    other = one[: len(other)] + other[len(one) :]
    first, second = hashed(token_ids=one).hashes, hashed(token_ids=other).hashes
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    assert shared == (len(first) if one == other else same // SIZE)


def test_a_text_is_hashed_like_tokens_of_four_bytes() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    content = text.encode() + bytes(-len(text.encode()) % 4)
    assert hashed(text=text).hashes == hashed(token_ids=array("I", content)).hashes


def test_a_text_of_a_known_number_of_tokens_matches_in_tokens() -> None:
    prompt = hashed(text="x" * 1024, prompt_tokens_estimated=512)  # 256 pieces: two tokens each
    assert (len(prompt.hashes), prompt.tokens(1), prompt.tokens(4)) == (4, 128, 512)
    assert hashed(text="x" * 1024).tokens(4) == 256


def test_a_match_reaches_no_further_than_the_prompt() -> None:
    prompt = hashed(token_ids=range(100))
    assert (len(prompt.hashes), prompt.tokens(1), prompt.tokens(2)) == (2, 64, 100)


def test_where_only_the_first_tokens_are_known_their_end_is_no_block() -> None:
    prompt = hashed(token_ids=range(100), tokens_complete=False)
    assert prompt.hashes == hashed(token_ids=range(64)).hashes


def test_the_bound_cuts_whole_blocks() -> None:
    assert hashed(2, token_ids=range(1000)).hashes == hashed(token_ids=range(1000)).hashes[:2]
    assert hashed(2, text="x" * 4000).hashes == hashed(text="x" * 4000).hashes[:2]


@pytest.mark.parametrize("other", [{"model": "n"}, {"lora_name": "l"}, {"cache_salt": "s"}, {"lora_name": "k"}])
@pytest.mark.parametrize("prompt", [{"token_ids": range(200)}, {"text": "x" * 800}], ids=["tokens", "text"])
def test_models_adapters_and_salts_share_nothing(prompt: dict[str, Any], other: dict[str, str]) -> None:
    assert not set(hashed(**prompt).hashes) & set(hashed(**prompt, **other).hashes)


def test_an_adapter_that_is_named_as_the_model_is_said_once() -> None:
    assert hashed(token_ids=range(64), model="l", lora_name="l").hashes == hashed(token_ids=range(64), model="l").hashes


def test_different_images_share_what_comes_before_them_only() -> None:
    def prompt(*items: MultimodalItem) -> list[int]:
        return list(hashed(token_ids=[7] * 320, multimodal=items).hashes)

    cat, dog, moved = (MultimodalItem("cat", 130, 20), MultimodalItem("dog", 130, 20), MultimodalItem("cat", 131, 20))
    for other in (prompt(dog), prompt(moved), prompt(), prompt(cat, dog)):
        assert prompt(cat)[:2] == other[:2]
        assert not set(prompt(cat)[2:]) & set(other[2:])
    assert prompt(cat) == prompt(cat)


def test_texts_with_different_images_share_nothing() -> None:
    cat, dog = (hashed(text="x" * 800, multimodal=(MultimodalItem(name, 0),)) for name in ("cat", "dog"))
    assert not set(cat.hashes) & set(dog.hashes)


def test_without_tokens_and_text_there_is_nothing_to_hash() -> None:
    assert hash_prompt(RouteRequest(id="r", model="m"), SIZE, None) is None
    assert not hashed(token_ids=[]).hashes
    assert hashed(text="\ud800").hashes  # what JSON can bring
