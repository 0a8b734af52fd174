"""Text and chats to tokens and scores: with nothing known, and as the next turn of a known chat. Wall time in milliseconds.

Baseline: the ``tokenizers`` package alone, given the whole text. Ours is all that a request costs in this process: chat
template, prefix store, tokens, block keys and the scores of 8 pods that hold the chat so far. Texts are those of a real trace
of agents (LMCache's taubench, in ``tests/data/traces``). The trace itself is tokenized in the order of its time stamps, as
completions and as chats, and the block keys of every request are compared with those of full tokenization.
Then what the benchmark of the proxy sends (``completions.py``), in CPU time. Last, block keys of other kinds than ours, in Rust
and in Python.
"""

from __future__ import annotations

import itertools
import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from tokenizers import Tokenizer

from benchmarks import completions
from benchmarks.result import Result, against, median, percentile
from benchmarks.sides import Placement
from kvatlas.config import load_config
from kvatlas.indexer import Indexer
from kvatlas.keys import EngineKeys, LlmdKeys
from kvatlas.keys.engine_hashes import UNSET_SEED, HashScheme
from kvatlas.results import Query
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt
from kvatlas.tokens.setup import make_tokenization
from kvatlas.tokens.tokenization import Tokenization
from kvatlas.types import BlockStored, EngineHash, EventBatch, PodId, Stream

T = TypeVar("T")

NAME = "tokens"
DATA = Path(__file__).parents[1] / "tests" / "data"
TINY = DATA / "tinymodel"
TRACE = DATA / "traces" / "lmcache_taubench.jsonl"
BASELINE = "tokenizers alone"
MODEL = "tiny"
PODS = 8
BLOCK_TOKENS = 16
TURN_CHARS = 400
"""What a turn adds to a chat: about a hundred tokens."""
TURNS = 15
CHATS = 3
STORES = ("segments", "trie", "chunks")
WARM_SHARE = 0.1
"""Aim: of full tokenization, what the next turn of a known chat costs."""


class Asked(msgspec.Struct):
    """One request of the trace."""

    timestamp: int
    input: str
    session_id: str


def run(*, quick: bool, place: Placement, tokenizer: Path | None = None) -> list[Result]:
    directory = tokenizer or TINY
    os.sched_setaffinity(0, place.measured)
    alone = Tokenizer.from_file(str(directory / "tokenizer.json"))
    requests = sorted(msgspec.json.decode(f"[{','.join(TRACE.read_text().splitlines())}]", type=list[Asked]), key=_time)
    words = _endless(requests)
    results = []
    for store in STORES:
        for tokens in (1_000, 8_000, 32_000) if quick else (1_000, 2_000, 4_000, 8_000, 16_000, 32_000):
            results += _one_size(directory, store, tokens, words, alone)
    asked_as_text = [TextPrompt(model=MODEL, text=asked.input, add_special_tokens=False) for asked in requests]
    chats = [_chat(asked.input.split("\n\n")) for asked in requests]
    for store in STORES:
        results += _trace(directory, store, "completions", asked_as_text, alone)
        results += _trace(directory, store, "chats", chats, alone)
        with _ours(directory, store) as (_, tokenization):
            results += completions.measure(NAME, store, tokenization, MODEL, alone, prompts=500 if quick else 2_000)
    return results + _keys()


@contextmanager
def _ours(directory: Path, store: str) -> Iterator[tuple[Indexer, Tokenization]]:
    settings = {
        "zmq.bind": "false",
        f"tokens.models.{MODEL}": str(directory),
        f"tokens.maxModelLen.{MODEL}": "1000000",
        "tokens.store.kind": store,
        "keys.blockSize": str(BLOCK_TOKENS),
    }
    config = load_config(environ={}, overrides=[f"{name}={value}" for name, value in settings.items()])
    indexer = Indexer(config)
    tokenization = make_tokenization(config.tokens, indexer.metrics)
    tokenization.tokenize(TextPrompt(model=MODEL, text="load"))
    try:
        yield indexer, tokenization
    finally:
        tokenization.close()
        indexer.close()


def _one_size(directory: Path, store: str, tokens: int, words: Iterator[str], alone: Tokenizer) -> list[Result]:
    """Chats of about ``tokens`` that then grow by turns: the first time, the next turn's tokens, the next turn's scores."""
    samples: dict[str, list[float]] = {"to scores, first time": [], "to tokens, next turn": [], "to scores, next turn": []}
    base: list[float] = []
    with _ours(directory, store) as (indexer, tokenization):
        assert tokenization.local is not None
        local = tokenization.local
        works: list[tuple[str, Callable[[ChatPrompt], array[int]]]] = [
            ("to tokens, next turn", lambda chat: local.tokenize(chat).token_ids),
            ("to scores, next turn", lambda chat: _scores(indexer, tokenization, chat)),
        ]
        for _ in range(CHATS):
            turns = _turns(tokens, words, alone)
            seconds, held = _timed(partial(_scores, indexer, tokenization, _chat(turns)))
            samples["to scores, first time"].append(seconds)
            _hold(indexer, held)
            for name, work in works * (TURNS // CHATS):
                turns.append(_text(TURN_CHARS, words))
                chat = _chat(turns)
                seconds, right = _timed(partial(_whole, alone, _rendered(tokenization, chat)))
                base.append(seconds)
                seconds, found = _timed(partial(work, chat))
                samples[name].append(seconds)
                if found.tolist() != right:
                    raise AssertionError("tokens differ from those of the whole text")
    whole = median(base) * 1e3
    return [
        against(
            NAME,
            f"chat of {tokens:,} tokens {what}, store {store}",
            median(seconds) * 1e3,
            "ms",
            BASELINE,
            whole,
            higher_is_better=False,
            reach=None if "first" in what else 1 / WARM_SHARE,
        )
        for what, seconds in samples.items()
    ]


def _trace(directory: Path, store: str, form: str, prompts: Sequence[Prompt], alone: Tokenizer) -> list[Result]:
    """The whole trace in order: time to tokens with the store, and by tokenizers alone."""
    ours: list[float] = []
    base: list[float] = []
    stored = total = differ = 0
    with _ours(directory, store) as (indexer, tokenization):
        assert tokenization.local is not None
        local = tokenization.local
        for prompt in prompts:
            text = prompt.text if isinstance(prompt, TextPrompt) else _rendered(tokenization, prompt)
            seconds, right = _timed(partial(_whole, alone, text))
            base.append(seconds)
            seconds, found = _timed(partial(local.tokenize, prompt))
            ours.append(seconds)
            keys = indexer.block_keys(Query(found.token_ids, MODEL))
            differ += keys != indexer.block_keys(Query(right, MODEL))
            stored += found.tokens_stored
            total += len(right)
    what = f"trace of {len(prompts)} requests as {form}, store {store}"
    return [
        against(NAME, f"{what}, all", sum(ours) * 1e3, "ms", BASELINE, sum(base) * 1e3, higher_is_better=False),
        against(
            NAME,
            f"{what}, p90 of a request",
            percentile(ours, 0.9) * 1e3,
            "ms",
            BASELINE,
            percentile(base, 0.9) * 1e3,
            higher_is_better=False,
        ),
        Result(NAME, f"{what}, tokens from the store", 100 * stored / total, "%", higher_is_better=True),
        Result(
            NAME,
            f"{what}, requests whose keys differ",
            differ,
            "requests",
            higher_is_better=False,
            target="0",
            met=differ == 0,
        ),
    ]


def _scores(indexer: Indexer, tokenization: Tokenization, chat: ChatPrompt) -> array[int]:
    tokens = tokenization.tokenize(chat).token_ids
    indexer.score(Query(tokens, MODEL))
    return tokens


def _hold(indexer: Indexer, tokens: array[int]) -> None:
    """Let every pod hold a prompt."""
    whole = tokens[: len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS]
    first = int(time.perf_counter_ns())
    hashes = tuple(EngineHash(first + number) for number in range(len(whole) // BLOCK_TOKENS))
    event = BlockStored(hashes, None, whole, BLOCK_TOKENS)
    for pod in range(PODS):
        indexer.index.apply(Stream(PodId(f"pod-{pod}")), EventBatch((event,), model=MODEL))


def _rendered(tokenization: Tokenization, chat: ChatPrompt) -> str:
    assert tokenization.local is not None
    return tokenization.local.tokenizers.get(MODEL).render(chat)


def _chat(turns: Sequence[str]) -> ChatPrompt:
    roles = itertools.cycle(("user", "assistant"))
    return ChatPrompt(model=MODEL, messages=[{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)])


def _turns(tokens: int, words: Iterator[str], alone: Tokenizer) -> list[str]:
    """Return turns of a chat of about so many tokens."""
    turns: list[str] = []
    count = 0
    while count < tokens - 120:
        turns.append(_text(TURN_CHARS, words))
        count += len(alone.encode(turns[-1], add_special_tokens=False).ids) + 6
    return turns


def _text(chars: int, words: Iterator[str]) -> str:
    taken: list[str] = []
    length = 0
    while length < chars:
        word = next(words)
        taken.append(word)
        length += len(word) + 1
    return " ".join(taken)


def _endless(requests: Sequence[Asked]) -> Iterator[str]:
    """Yield the trace's words for ever, never the same run of them twice: each round begins elsewhere."""
    words = " ".join(dict.fromkeys(part for asked in requests for part in asked.input.split("\n\n"))).split(" ")
    for stride in itertools.count(1):
        yield from words[stride % len(words) :: 1 + stride % 7]


def _keys() -> list[Result]:
    """Block keys of 32,768 tokens of each kind that Rust computes, beside the reference in Python."""
    tokens = array("I", (number * 7919 % 128_000 for number in range(32_768)))
    recipes = {
        "llmd-cbor-fnv": LlmdKeys(BLOCK_TOKENS),
        "llmd-xxh64": LlmdKeys(BLOCK_TOKENS, mode="llmd-xxh64"),
        "engine, sha256_cbor": EngineKeys(HashScheme("sha256_cbor", UNSET_SEED), BLOCK_TOKENS),
        "engine, xxhash_cbor": EngineKeys(HashScheme("xxhash_cbor", "0"), BLOCK_TOKENS),
    }
    results = []
    for name, recipe in recipes.items():
        ours = [_timed(partial(recipe.keys, tokens, MODEL)) for _ in range(TURNS)]
        python = [_timed(partial(recipe.in_python().keys, tokens, MODEL)) for _ in range(CHATS)]
        if ours[0][1] != python[0][1]:
            raise AssertionError(f"{name}: keys differ")
        value, whole = median([seconds for seconds, _ in ours]) * 1e3, median([seconds for seconds, _ in python]) * 1e3
        what = f"keys of 32,768 tokens, {name}"
        results.append(against(NAME, what, value, "ms", "the reference in Python", whole, higher_is_better=False))
    return results


def _whole(alone: Tokenizer, text: str) -> list[int]:
    ids: list[int] = alone.encode(text, add_special_tokens=False).ids
    return ids


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _time(asked: Asked) -> int:
    return asked.timestamp
