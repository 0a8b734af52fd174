"""The demo's traffic: chats of the packaged trace.

Source: LMCache/lmcache-agent-trace, Apache-2.0: agents at work on tau-bench, 471 requests in 24 sessions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from importlib.resources import as_file, files
from typing import Any

import msgspec

from kvatlas.sim.workloads.text_trace import EXAMPLE
from kvatlas.sim.workloads.trace_lines import TraceLines

PACKAGED = "taubench.jsonl.gz"
ANSWER_TOKENS_MIN, ANSWER_TOKENS_MAX = 8, 48


class Chat(msgspec.Struct, frozen=True):
    """One request of a session: all messages so far."""

    messages: tuple[dict[str, str], ...]
    output_tokens: int

    def body(self, model: str) -> dict[str, Any]:
        return {"model": model, "messages": self.messages, "max_tokens": self.output_tokens}


class _Record(msgspec.Struct):
    timestamp: int
    input: str
    output: str
    session_id: str


def sessions(seed: int) -> Iterator[tuple[Chat, ...]]:
    """Yield sessions without end: the trace's in random order, then the same of another customer, and so on."""
    recorded = _read()
    for customer in itertools.count():
        order = list(recorded)
        random.Random(seed + customer).shuffle(order)  # noqa: S311  not for secrets
        for session in order:
            yield tuple(_chat(record, customer) for record in session)


def _read() -> list[list[_Record]]:
    """Return the trace's sessions, each in the order of time."""
    with as_file(files("kvatlas.demo") / PACKAGED) as file:
        records = [record for _, record in TraceLines(file, _Record, EXAMPLE)]
    found: dict[str, list[_Record]] = {}
    for record in sorted(records, key=lambda one: one.timestamp):
        found.setdefault(record.session_id, []).append(record)
    return list(found.values())


def _chat(record: _Record, customer: int) -> Chat:
    turns = [f"I am customer {customer}.", *record.input.split("\n\n")]
    messages = tuple({"role": "assistant" if at % 2 else "user", "content": turn} for at, turn in enumerate(turns))
    words = len(record.output.split())
    return Chat(messages, min(ANSWER_TOKENS_MAX, max(ANSWER_TOKENS_MIN, words)))
