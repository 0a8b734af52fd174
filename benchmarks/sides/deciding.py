"""A router as ``kvatlas route`` has it, without sockets: what each step of a request costs it. CPU time.

Prompts are chats of 1,700 to 2,150 tokens, 1,500 of them one of 64 system prompts; tokens are given. Requests come a thousand a
second on the router's clock, 50 at once. Engines tell their events of each before the next 50 come, which is not measured.
"""

from __future__ import annotations

import random
import sys
import time
from array import array
from collections.abc import Callable, Coroutine
from statistics import median
from typing import TypeVar

import msgspec
from prometheus_client import CollectorRegistry

from kvatlas.config import load_config
from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.indexer import Indexer
from kvatlas.results import Query
from kvatlas.route.load import EngineReport
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.picker_config import build_router, read_config
from kvatlas.route.router import Flight
from kvatlas.serve.admission import admission_of
from kvatlas.serve.routing.answers import AnswerReader, Usage
from kvatlas.serve.routing.asked import CHAT, Asked, read_request
from kvatlas.serve.routing.dispatch import Dispatcher, Trip
from kvatlas.serve.routing.metrics import RoutingMetrics
from kvatlas.serve.routing.picker import OURS
from kvatlas.tokens.setup import make_tokenization
from kvatlas.types import BlockStored, EngineHash, EventBatch, Stream

STAGES = ("read", "admit", "decide", "note", "send", "first token", "answer", "end")
AT_ONCE = 50
MODEL = "m"
SHARED_TOKENS = 1_500
BLOCK_TOKENS = 16
PIECE = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
PIECES = 16

HEADERS = {
    **{"host": "127.0.0.1:8000", "user-agent": "wrk", "accept": "*/*", "content-type": "application/json"},
    "content-length": "8000",
}

T = TypeVar("T")


class Deciding:
    """One router with its endpoints."""

    def __init__(self, endpoints: int) -> None:
        self._now_s = 1_000.0
        self._random = random.Random(1)
        config = load_config(environ={}, overrides=("zmq.bind=false",))
        self._index = Indexer(config, clock=lambda: self._now_s)
        picker = read_config(OURS, "kvatlas")
        self._router = build_router(picker, index=self._index, clock=lambda: self._now_s)
        self._router.set_endpoints(
            pool_from_urls([f"http://10.0.{n // 250}.{n % 250}:8000" for n in range(endpoints)]).endpoints
        )
        self._pods = {endpoint.name: endpoint.stream for endpoint in self._router.endpoints}
        self._admission = admission_of(self._router, picker.flow_control, flow_control=False, clock=lambda: self._now_s)
        self._metrics = RoutingMetrics(CollectorRegistry())
        tokenization = make_tokenization(config.tokens, self._index.metrics)
        self._dispatcher = Dispatcher(self._router, tokenization, self._admission, self._metrics)
        self._shared = [self._tokens(SHARED_TOKENS) for _ in range(64)]
        self._number = 0
        self._held: dict[Stream, set[EngineHash]] = {}
        for stream in self._pods.values():
            self._hold(stream, self._tokens(BLOCK_TOKENS))  # it is heard of

    def us_by_stage(self, batches: int) -> dict[str, float]:
        """Return the CPU time of each stage of a request, the median of ``batches`` batches, after half as many to warm up."""
        for _ in range(batches // 2):
            self._batch()
        took = [self._batch() for _ in range(batches)]
        return {stage: median([one[stage] for one in took]) for stage in STAGES}

    def _batch(self) -> dict[str, float]:
        took: dict[str, float] = {}

        def timed(stage: str, work: Callable[[int], T]) -> list[T]:
            began_s = time.process_time()
            done = [work(number) for number in range(AT_ONCE)]
            took[stage] = took.get(stage, 0.0) + (time.process_time() - began_s) / AT_ONCE * 1e6
            return done

        self._now_s += AT_ONCE / 1_000
        for name in self._pods:
            self._router.report(name, EngineReport(at_s=self._now_s, running=2, kv_usage=0.2))
        prompts = [self._prompt() for _ in range(AT_ONCE)]
        bodies, headers = [_body(number) for number in range(AT_ONCE)], [self._headers() for _ in range(AT_ONCE)]
        asked: list[Asked] = timed("read", lambda at: read_request(CHAT, headers[at], bodies[at], subset=None, priorities={}))
        requests = timed("read", lambda at: msgspec.structs.replace(asked[at].request, token_ids=prompts[at]))
        timed("admit", lambda at: _at_once(self._admission.admit(requests[at], len(bodies[at]))))
        flights: list[Flight] = timed("decide", lambda at: self._router.decide(requests[at]))
        timed("note", lambda at: self._metrics.decided(flights[at].decision))
        timed("note", lambda at: self._metrics.stages(1e-4, 1e-3, 1e-6, 1e-4))
        trips = timed("send", lambda at: Trip(self._dispatcher, asked[at], flights[at]))
        timed("send", lambda at: (trips[at].request_headers(), trips[at].body_sent(), trips[at].answered(headers[at])))
        timed("first token", lambda at: trips[at].first_token(0.1))
        pairs = zip(flights, prompts, strict=True)
        ends = [_end(len(prompt), self._hold(self._pods[flight.endpoint], prompt)) for flight, prompt in pairs]
        usages = timed("answer", lambda at: _read_answer(ends[at]))
        outcomes = [self._outcome(usage) for usage in usages]
        timed("end", lambda at: trips[at].finished(outcomes[at]))
        return took

    def _hold(self, stream: Stream, prompt: array[int]) -> int:
        """Have an engine tell that it computed what it did not hold of a prompt; return how many tokens it did."""
        keys = [EngineHash(key) for key in self._index.block_keys(Query(prompt, MODEL))]
        held = self._held.setdefault(stream, set())
        first = next((at for at, key in enumerate(keys) if key not in held), len(keys))
        tokens = prompt[first * BLOCK_TOKENS : len(keys) * BLOCK_TOKENS]
        event = BlockStored(tuple(keys[first:]), keys[first - 1] if first else None, tokens, BLOCK_TOKENS)
        self._index.index.apply(stream, EventBatch((event,), model=MODEL))
        held.update(keys)
        return first * BLOCK_TOKENS

    def _prompt(self) -> array[int]:
        return self._random.choice(self._shared) + self._tokens(self._random.randrange(200, 650))

    def _tokens(self, count: int) -> array[int]:
        return array("I", self._random.choices(range(100_000), k=count))

    def _headers(self) -> dict[str, str]:
        self._number += 1
        return {**HEADERS, "x-request-id": f"request-{self._number}"}

    def _outcome(self, usage: Usage) -> Outcome:
        return Outcome(
            end=End.DONE,
            ttft_s=self._random.uniform(0.05, 0.15),
            duration_s=0.5,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.output_tokens,
        )


def _body(number: int) -> bytes:
    messages = [{"role": "system", "content": "word " * 1_200}, {"role": "user", "content": f"{number} " + "other " * 300}]
    return msgspec.json.encode({"model": MODEL, "messages": messages, "max_tokens": PIECES, "stream": True})


def _end(prompt_tokens: int, cached_tokens: int) -> bytes:
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": PIECES,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    return b"data: " + msgspec.json.encode({"id": "x", "choices": [], "usage": usage}) + b"\n\ndata: [DONE]\n\n"


def _read_answer(end: bytes) -> Usage:
    reader = AnswerReader(stream=True)
    for _ in range(PIECES):
        reader.feed(PIECE)
    reader.feed(end)
    return reader.usage()


def _at_once(admitted: Coroutine[object, object, None]) -> None:
    """Run what waits for nothing."""
    try:
        admitted.send(None)
    except StopIteration:
        return
    raise AssertionError("admission waited")


def main(endpoints: int, batches: int) -> None:
    """Print what each stage costs, as JSON."""
    sys.stdout.write(msgspec.json.encode(Deciding(endpoints).us_by_stage(batches)).decode() + "\n")
