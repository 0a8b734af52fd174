"""What keeps prompts of equal tokens apart: images, cache salts, adapters, models. In every ``keys.mode`` and on every core.

A key stands for a prompt up to its block, with all that is hashed into these blocks. So two prompts have the same keys up to
the first block where any of that differs, and share none from there on; and of a prompt that a stream holds, another one finds
no more than the blocks before.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.config import Config, EngineHashSettings, IndexSettings, KeySettings, ZmqSettings
from kvatlas.indexer import Indexer
from kvatlas.keys import EngineKeys, HashScheme, KeyRecipe, KeySchema, LlmdKeys
from kvatlas.results import Query
from kvatlas.types import BlockKey, Frame, MultimodalItem
from tests.contract.implementations import IMPLEMENTATIONS

EXAMPLES = 80 * int(os.environ.get("KVATLAS_EXAMPLES_FACTOR", "1"))
SEED = "42"
LORAS = {"sql": "/loras/sql", "law": "/loras/law"}
MODES = {
    "kvatlas": KeySettings(),
    "engine sha256_cbor": KeySettings(
        mode="engine", engine=EngineHashSettings(algorithm="sha256_cbor", seed=SEED, loras=LORAS)
    ),
    "engine xxhash_cbor": KeySettings(
        mode="engine", engine=EngineHashSettings(algorithm="xxhash_cbor", seed=SEED, loras=LORAS)
    ),
    "llmd-cbor-fnv": KeySettings(mode="llmd-cbor-fnv", seed=SEED),
    "llmd-xxh64": KeySettings(mode="llmd-xxh64", seed=SEED),
}
SCHEMES = {"engine sha256_cbor": HashScheme("sha256_cbor", SEED), "engine xxhash_cbor": HashScheme("xxhash_cbor", SEED)}

modes = pytest.mark.parametrize("mode", MODES)
cores = pytest.mark.parametrize("core", IMPLEMENTATIONS)


class Asked(msgspec.Struct, frozen=True):
    """All of a prompt but its tokens."""

    model: str = "m"
    lora: str | None = None
    salt: str | None = None
    items: tuple[MultimodalItem, ...] = ()

    def query(self, tokens: Sequence[int]) -> Query:
        return Query(list(tokens), self.model, lora_name=self.lora, cache_salt=self.salt, multimodal=self.items)


# -- what is to be expected, told apart from how keys are made ---------------------------------------------------------------


def hashed(mode: str, asked: Asked, block: int, size: int) -> object:
    """Return all that a block's key must depend on beside tokens and the key before it."""
    root = (asked.lora, None if mode.startswith("engine") or asked.lora else asked.model, asked.salt)
    start, end = block * size, (block + 1) * size
    items: list[object]
    if mode == "kvatlas":  # an item counts where it starts
        items = [(item.hash, item.offset_tokens) for item in asked.items if start <= item.offset_tokens < end]
    else:  # an item counts in each block that it touches; llm-d's keys do not say where in it
        touching = [item for item in asked.items if item.offset_tokens < end and start < item.offset_tokens + length(item)]
        items = [item.hash if mode.startswith("llmd") else (item.hash, item.offset_tokens - start) for item in touching]
    return (root if block == 0 else None, items)


def alike(mode: str, one: Asked, other: Asked, blocks: int, size: int) -> int:
    """Return how many leading blocks of two prompts of equal tokens are the same."""
    for block in range(blocks):
        if hashed(mode, one, block, size) != hashed(mode, other, block, size):
            return block
    return blocks


def length(item: MultimodalItem) -> int:
    assert item.length_tokens is not None
    return item.length_tokens


# -- prompts -----------------------------------------------------------------------------------------------------------------

NAMES = ("cafe", "sql", "m", "ü")
"""Salts, images, adapters and models have the same ones: a key must not take one for another."""


@st.composite
def image_sets(draw: st.DrawFn, tokens: int, names: Sequence[str] = NAMES) -> tuple[MultimodalItem, ...]:
    items = []
    at = 0
    for _ in range(draw(st.integers(0, 3))):
        at += draw(st.integers(0, 7))
        if at >= tokens:
            break
        items.append(MultimodalItem(draw(st.sampled_from(names)), at, draw(st.integers(1, min(9, tokens - at)))))
        at += length(items[-1])
    return tuple(items)


@st.composite
def pairs(draw: st.DrawFn, mode: str) -> tuple[list[int], Asked, Asked]:
    """Return tokens, and two prompts of them that differ in nothing, one thing or several."""
    tokens = draw(st.lists(st.integers(0, 2), min_size=1, max_size=40))
    # llm-d's keys do not tell a salt from an image of that name: theirs is the format.
    salts = ("tenant", "tenänt") if mode.startswith("llmd") else NAMES
    fields: dict[str, st.SearchStrategy[Any]] = {
        "model": st.sampled_from(("m", "n", "ü")),
        "lora": st.none() | st.sampled_from(sorted(LORAS)),
        "salt": st.none() | st.sampled_from(salts),
        "items": image_sets(len(tokens)),
    }
    one = draw(st.builds(Asked, **fields))
    changed = draw(st.sets(st.sampled_from(sorted(fields)), max_size=2))
    return tokens, one, msgspec.structs.replace(one, **{name: draw(fields[name]) for name in changed})


# -- keys --------------------------------------------------------------------------------------------------------------------


def recipe(mode: str, size: int) -> KeyRecipe:
    return Indexer(Config(keys=msgspec.structs.replace(MODES[mode], block_size=size))).schema


def keys_of(keys: KeyRecipe, tokens: Sequence[int], asked: Asked) -> list[BlockKey]:
    """Return a prompt's keys; natively and in Python they are the same."""
    more: dict[str, Any] = {"lora_name": asked.lora, "cache_salt": asked.salt, "multimodal": asked.items}
    found = keys.keys(array("I", tokens), asked.model, **more)
    if isinstance(keys, EngineKeys | KeySchema | LlmdKeys):
        assert keys.in_python().keys(array("I", tokens), asked.model, **more) == found
    return found


def check_keys(mode: str, keys: KeyRecipe, tokens: Sequence[int], one: Asked, other: Asked) -> int:
    """Check two prompts' keys; return how many blocks are alike."""
    mine, theirs = keys_of(keys, tokens, one), keys_of(keys, tokens, other)
    blocks = len(tokens) // keys.block_size_tokens
    assert len(mine) == len(theirs) == blocks
    same = alike(mode, one, other, blocks, keys.block_size_tokens)
    assert mine[:same] == theirs[:same]
    assert not set(mine[same:]) & set(theirs)
    assert not set(theirs[same:]) & set(mine)
    return same


@modes
@given(data=st.data(), size=st.integers(1, 9))
@settings(max_examples=EXAMPLES * 2, deadline=None)
def test_prompts_share_keys_up_to_where_they_differ_and_none_beyond(mode: str, data: st.DataObject, size: int) -> None:
    tokens, one, other = data.draw(pairs(mode))
    check_keys(mode, recipe(mode, size), tokens, one, other)


@modes
@given(size=st.integers(1, 9), blocks=st.integers(2, 6), offset=st.integers(0, 50), data=st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_another_image_or_place_changes_all_keys_from_the_first_block_that_it_touches(
    mode: str, size: int, blocks: int, offset: int, data: st.DataObject
) -> None:
    tokens = [7] * (size * blocks)
    at = offset % len(tokens)
    one = Asked(items=(MultimodalItem("cafe", at, data.draw(st.integers(1, len(tokens) - at))),))
    same = partial(check_keys, mode, recipe(mode, size), tokens, one)
    touched = at // size
    assert same(Asked(items=(MultimodalItem("beef", at, one.items[0].length_tokens),))) == touched
    assert same(Asked()) == touched
    assert same(one) == blocks
    elsewhere = data.draw(st.integers(0, len(tokens) - 1).filter(lambda place: place // size != touched))
    assert same(Asked(items=(MultimodalItem("cafe", elsewhere, 1),))) == min(touched, elsewhere // size)
    if not mode.startswith("llmd") and at:
        assert same(Asked(items=(MultimodalItem("cafe", at - 1, length(one.items[0])),))) == (at - 1) // size


@modes
@pytest.mark.parametrize("asked", [Asked(salt="s"), Asked(lora="sql"), Asked(salt="s", lora="sql"), Asked(model="n")])
def test_another_salt_adapter_or_model_shares_no_key_at_all(mode: str, asked: Asked) -> None:
    tokens = list(range(64))
    if mode.startswith("engine") and asked.model != "m":
        assert check_keys(mode, recipe(mode, 16), tokens, Asked(), asked) == 4, "engines do not hash the model"
        return
    for other in (Asked(), Asked(salt="t"), Asked(lora="law"), Asked(model="k", salt="t")):
        assert check_keys(mode, recipe(mode, 16), tokens, asked, other) == 0


# -- from events to scores ---------------------------------------------------------------------------------------------------


def extra_keys(asked: Asked, block: int, size: int) -> list[Any] | None:
    """Return what vLLM 0.32 publishes of a block as ``extra_keys``: adapter, images, salt."""
    start, end = block * size, (block + 1) * size
    extras: list[Any] = [] if asked.lora is None else [asked.lora]
    for item in asked.items:
        if item.offset_tokens < end and start < item.offset_tokens + length(item):
            extras.append((item.hash, item.offset_tokens - start))
    if block == 0 and asked.salt is not None:
        extras.append(asked.salt)
    return extras or None


def hashes_of(mode: str, tokens: Sequence[int], asked: Asked, size: int) -> list[int]:
    """Return the engine's block hashes, as its scheme makes them of what it hashes."""
    scheme = SCHEMES.get(mode, SCHEMES["engine sha256_cbor"])
    digest, found = scheme.none_hash(), []
    for block in range(len(tokens) // size):
        start, end = block * size, (block + 1) * size
        extras: list[Any] = [] if asked.lora is None else [("lora", asked.lora, LORAS[asked.lora])]
        for item in asked.items:
            if item.offset_tokens < end and start < item.offset_tokens + length(item):
                extras.append(("mm", item.hash, item.offset_tokens - start))
        if block == 0 and asked.salt is not None:
            extras.append(("cache_salt", asked.salt))
        digest = scheme.block_hash(digest, tokens[start:end], extras)
        found.append(int.from_bytes(digest[-8:], "big"))
    return found


def payloads(mode: str, tokens: Sequence[int], asked: Asked, size: int, cut: int) -> Iterator[bytes]:
    """Return the events in which an engine stores a prompt: its blocks before ``cut``, then those after it."""
    hashes = hashes_of(mode, tokens, asked, size)
    for first, last in ((0, cut), (cut, len(hashes))):
        if first >= last:
            continue
        event = {
            "type": "BlockStored",
            "block_hashes": hashes[first:last],
            "parent_block_hash": hashes[first - 1] if first else None,
            "token_ids": list(tokens[first * size : last * size]),
            "block_size": size,
            "lora_id": None if asked.lora is None else 1,
            "medium": "GPU",
            "lora_name": asked.lora,
            "extra_keys": [extra_keys(asked, block, size) for block in range(first, last)],
        }
        yield msgspec.msgpack.encode([0.0, [event], None])


@modes
@cores
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_stored_prompt_is_found_by_its_equals_and_by_others_up_to_where_they_differ(
    mode: str, core: str, data: st.DataObject
) -> None:
    tokens, stored, other = data.draw(pairs(mode))
    size = data.draw(st.integers(1, 9), label="index block")
    # Whatever the engine's blocks are: ours are cut anew. Its own hashes need blocks of its size; llm-d's keys do not say
    # where in an engine's block an image ends, and are exact where its blocks are no larger.
    if mode.startswith("engine"):
        engine_size = size
    elif mode == "kvatlas":
        engine_size = data.draw(st.integers(1, 9), label="engine block")
    else:
        engine_size = data.draw(st.sampled_from([divisor for divisor in range(1, size + 1) if size % divisor == 0]))
    config = Config(
        keys=msgspec.structs.replace(MODES[mode], block_size=size),
        index=IndexSettings(core=core),  # type: ignore[arg-type]
        zmq=ZmqSettings(bind=False),
    )
    whole = len(tokens) // engine_size
    with Indexer(config) as indexer:
        for seq, payload in enumerate(payloads(mode, tokens, stored, engine_size, data.draw(st.integers(0, whole)))):
            indexer.publish(Frame(f"kv@pod@{stored.model}", seq, payload, 0))
        indexer.drain()
        held = whole * engine_size // size
        same = alike(mode, stored, other, len(tokens) // size, size)
        candidate = not mode.startswith("engine") or other.model == stored.model
        for asked, blocks in ((stored, held), (other, min(held, same) if candidate else 0)):
            found = indexer.score(asked.query(tokens))
            assert found.cache_hits == blocks
            step = math.lcm(size, engine_size)  # what can be reused ends where blocks of both kinds end
            assert max((pod.matched_tokens for pod in found.pods), default=0) == blocks * size // step * step
