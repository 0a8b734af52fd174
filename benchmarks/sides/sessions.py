"""Sessions to replay, made from the packaged traces: requests that follow each other, as an engine's API takes them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from benchmarks.sides.process import ROOT

TRACES = ROOT / "tests" / "data" / "traces"
TAUBENCH = TRACES / "lmcache_taubench.jsonl"
MOONCAKE = TRACES / "mooncake_conversations.jsonl"
CUSTOMERS = 5
"""So often is each session of taubench played, under another name: the trace has 24."""
WORDS_PER_HASH = 8
"""What stands for a block of 512 tokens: about 16, a 32nd."""
OUTPUT_SCALE = 32
OUTPUT_MAX = 16


class Request(msgspec.Struct, frozen=True):
    """One request; ``body`` without the model."""

    path: str
    body: Mapping[str, Any]


T = TypeVar("T")
Session = tuple[Request, ...]


class _Asked(msgspec.Struct):
    timestamp: int
    input: str
    output: str
    session_id: str


class _Conversed(msgspec.Struct):
    timestamp: int
    output_length: int
    hash_ids: list[int]
    conversation: int


def taubench(seed: int, turns_max: int) -> list[Session]:
    """Chats of agents, in any order, each up to so many requests."""
    by_session: dict[str, list[_Asked]] = {}
    for asked in sorted(_read(TAUBENCH, _Asked), key=lambda one: one.timestamp):
        by_session.setdefault(asked.session_id, []).append(asked)
    sessions = [
        tuple(_chat(customer, asked) for asked in turns[:turns_max])
        for turns in by_session.values()
        for customer in range(CUSTOMERS)
    ]
    random.Random(seed).shuffle(sessions)
    return sessions


def mooncake(seed: int, turns_max: int) -> list[Session]:
    """Completions, scaled down; words are those of the other trace. In any order, each up to so many requests."""
    text = " ".join(asked.input for asked in _read(TAUBENCH, _Asked))
    words = [word for word, _ in Counter(re.findall(r"[a-z]{3,}", text)).most_common(256)]
    by_conversation: dict[int, list[_Conversed]] = {}
    for conversed in _read(MOONCAKE, _Conversed):
        by_conversation.setdefault(conversed.conversation, []).append(conversed)
    sessions = [tuple(_completion(words, conversed) for conversed in turns[:turns_max]) for turns in by_conversation.values()]
    random.Random(seed).shuffle(sessions)
    return sessions


def next_sessions(sessions: Iterator[Session], requests: int) -> list[Session]:
    """Take as many sessions as make so many requests, as far as there are any."""
    taken, count = [], 0
    while count < requests and (session := next(sessions, None)) is not None:
        taken.append(session)
        count += len(session)
    return taken


def _chat(customer: int, asked: _Asked) -> Request:
    turns = [f"I am customer {customer}.", *asked.input.split("\n\n")]
    messages = [{"role": "assistant" if at % 2 else "user", "content": turn} for at, turn in enumerate(turns)]
    output = min(OUTPUT_MAX, max(2, len(asked.output.split())))
    return Request("/v1/chat/completions", {"messages": messages, "max_tokens": output})


def _completion(words: Sequence[str], conversed: _Conversed) -> Request:
    runs = (" ".join(random.Random(block).choices(words, k=WORDS_PER_HASH)) for block in conversed.hash_ids)
    output = min(OUTPUT_MAX, max(2, conversed.output_length // OUTPUT_SCALE))
    return Request("/v1/completions", {"prompt": " ".join(runs), "max_tokens": output})


def _read(path: Path, kind: type[T]) -> list[T]:
    return msgspec.json.decode(f"[{','.join(path.read_text().splitlines())}]", type=list[kind])  # type: ignore[valid-type]
