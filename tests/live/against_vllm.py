"""Predictions against a real vLLM's own ``cached_tokens``, live over ZMQ.

    tests/live/vllm.sh setup                  # once: several GB
    python -m tests.live.against_vllm         # about five minutes on two cores

One engine with room for 60 blocks is asked sequentially: multi-turn chats, shared prefixes, cache salts, so that it evicts all
the time. It is reset now and then, and killed with SIGKILL and started again. Three indexers watch it:

* ``direct``: connected to the engine, with its replay endpoint;
* ``lossy``: behind a proxy that drops frames, with the replay endpoint;
* ``lossy, no replay``: behind the same proxy, without it.

Before each request all three predict. A prediction must be exact unless the pod is marked stale. Counted apart, because no
event has told of it yet: the first request after a reset (the engine publishes the clear with its next step), and, without
replay, what comes between a dropped frame and the next one that arrives.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import msgspec
import zmq
import zmq.asyncio

from kvatlas.config import Config, EngineSettings, IngestSettings, Seconds, ZmqSettings
from kvatlas.indexer import Indexer
from kvatlas.results import PodScore, Query

HERE = Path(__file__).parent


class LossyProxy:
    """Passes an engine's frames on, but drops a share of them."""

    def __init__(self, upstream: str, drop_share: float, seed: int) -> None:
        self._context = zmq.asyncio.Context()
        self._in = self._context.socket(zmq.SUB)
        self._in.set(zmq.RECONNECT_IVL_MAX, 500)
        self._in.connect(upstream)
        self._in.subscribe(b"")
        self._out = self._context.socket(zmq.PUB)
        self.port = self._out.bind_to_random_port("tcp://127.0.0.1")
        self._drop_share = drop_share
        self._random = random.Random(seed)
        self.passed = 0
        self.dropped = 0
        self.tail_dropped = False
        """The last frame that came was dropped."""

    async def run(self) -> None:
        while True:
            parts = await self._in.recv_multipart()
            self.tail_dropped = self._random.random() < self._drop_share
            if self.tail_dropped:
                self.dropped += 1
            else:
                self.passed += 1
                await self._out.send_multipart(parts)


class Engine:
    """The vLLM process and its API."""

    def __init__(self, log: Path) -> None:
        self.http_port, self.event_port = _free_ports()
        self.url = f"http://127.0.0.1:{self.http_port}"
        self._log = log.open("ab")
        self._client = httpx.Client(timeout=60)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it; return how long it took, in seconds."""
        started = time.monotonic()
        command = [str(HERE / "vllm.sh"), "serve", str(self.http_port), str(self.event_port)]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, start_new_session=True)
        while True:
            if self._process.poll() is not None or time.monotonic() - started > 300:
                sys.exit(f"vLLM did not come up: see {self._log.name}")
            try:
                if self._client.get(f"{self.url}/health").status_code == 200:
                    return time.monotonic() - started
            except httpx.TransportError:
                time.sleep(0.5)

    def kill(self) -> None:
        """End it as an out-of-memory killer would."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def complete(self, prompt: list[int], output_tokens: int, salt: str | None) -> tuple[int, list[int]]:
        """Return (cached tokens, tokens generated)."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True} | ({"cache_salt": salt} if salt else {})
        answer = self._client.post(f"{self.url}/v1/completions", json=body).raise_for_status().json()
        details = answer["usage"].get("prompt_tokens_details") or {}
        return details.get("cached_tokens") or 0, answer["choices"][0]["token_ids"]

    def reset(self) -> None:
        self._client.post(f"{self.url}/reset_prefix_cache").raise_for_status()


class Tally(msgspec.Struct):
    """What became of one indexer's predictions."""

    exact: int = 0
    wrong: int = 0
    stale_exact: int = 0
    stale_wrong: int = 0
    after_reset: int = 0
    after_reset_exact: int = 0
    unseen_loss: int = 0
    unseen_loss_exact: int = 0
    stale_reasons: dict[str, int] = msgspec.field(default_factory=dict)
    examples: list[str] = msgspec.field(default_factory=list)

    def add(self, pod: PodScore | None, truth: int, *, after_reset: bool, unseen_loss: bool, what: str) -> None:
        predicted = pod.predicted_cached_tokens if pod else 0
        exact = predicted == truth
        if pod is not None and pod.stale:
            reason = pod.stale_reason.value if pod.stale_reason else "?"
            self.stale_reasons[reason] = self.stale_reasons.get(reason, 0) + 1
            self.stale_exact += exact
            self.stale_wrong += not exact
        elif after_reset:
            self.after_reset += 1
            self.after_reset_exact += exact
        elif unseen_loss:
            self.unseen_loss += 1
            self.unseen_loss_exact += exact
        else:
            self.exact += exact
            self.wrong += not exact
            if not exact:
                self.examples.append(f"{what}: predicted {predicted}, engine {truth}")


class Workload:
    """Multi-turn chats over shared prefixes, with salts; seeded."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._systems = [self._tokens(length) for length in (96, 160, 224)]
        self._chats: list[list[int]] = []

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(10, 4000) for _ in range(count)]

    def next(self) -> tuple[list[int], int, str | None, int]:
        """Return prompt, output tokens, salt, and the chat's number."""
        if self._chats and self._random.random() < 0.65:
            chat = self._random.randrange(max(0, len(self._chats) - 6), len(self._chats))
            self._chats[chat] += self._tokens(self._random.choice((5, 17, 32, 60)))
        else:
            chat = len(self._chats)
            self._chats.append(self._random.choice(self._systems) + self._tokens(self._random.choice((1, 16, 32, 64))))
        if len(self._chats[chat]) > 700:
            self._chats[chat] = self._random.choice(self._systems) + self._tokens(32)
        salt = self._random.choice((None, None, None, "s0", "s1"))
        return list(self._chats[chat]), self._random.choice((1, 1, 4, 8, 40)), salt, chat

    def answered(self, chat: int, output: list[int]) -> None:
        self._chats[chat] += output


def watch(endpoint: str, replay: str | None) -> Indexer:
    return Indexer(
        Config(
            zmq=ZmqSettings(engines=(EngineSettings(endpoint=endpoint, replay_endpoint=replay),), reconnect_max=Seconds(0.5)),
            ingest=IngestSettings(audit_interval=Seconds(0), gone_after=Seconds(600)),
        )
    )


def settle(name: str, indexer: Indexer, reference: Indexer) -> None:
    """Bring an indexer up to what has been published: by asking, or by waiting for as much as the reference has."""
    if name != "lossy, no replay":
        deadline = time.monotonic() + 20
        while not indexer.sync() and time.monotonic() < deadline:
            time.sleep(0.2)
        return
    deadline = time.monotonic() + 0.3
    while _next_seq(indexer) != _next_seq(reference) and time.monotonic() < deadline:
        time.sleep(0.005)


def _next_seq(indexer: Indexer) -> int | None:
    return next((pod.next_seq for pod in indexer.pods() if pod.next_seq is not None), None)


def _free_ports() -> tuple[int, int]:
    """Return an HTTP port and an event port whose replay port (+ 50) is free too."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1] - 50 if two.getsockname()[1] > 60_000 else two.getsockname()[1]


def run(requests: int, kills: int, resets: int, drop_share: float, seed: int, log: Path) -> dict[str, object]:
    engine = Engine(log)
    print(f"starting vLLM (log: {log}) ...", flush=True)
    startup_s = [engine.start()]
    events = f"tcp://127.0.0.1:{engine.event_port}"
    replay = f"tcp://127.0.0.1:{engine.event_port + 50}"
    proxy, stop_proxy = _start_proxy(events, drop_share, seed)
    indexers = {
        "direct": watch(events, replay),
        "lossy": watch(f"tcp://127.0.0.1:{proxy.port}", replay),
        "lossy, no replay": watch(f"tcp://127.0.0.1:{proxy.port}", None),
    }
    tallies = {name: Tally() for name in indexers}
    order = random.Random(seed)
    kill_at = {requests * (i + 1) // (kills + 1) for i in range(kills)}
    reset_at = set(order.sample(range(5, requests), resets))
    workload = Workload(seed)
    hits = Counter[str]()
    for indexer in indexers.values():
        indexer.start()
    time.sleep(1)
    after_reset = False
    started = time.monotonic()
    try:
        for number in range(requests):
            if number in kill_at:
                print(f"request {number}: kill -9", flush=True)
                engine.kill()
                startup_s.append(engine.start())
                time.sleep(1)
                after_reset = False
            if number in reset_at:
                engine.reset()
                after_reset = True
            prompt, output_tokens, salt, chat = workload.next()
            predictions = {}
            for name, indexer in indexers.items():
                settle(name, indexer, indexers["direct"])
                pods = indexer.score(Query(prompt, "tiny", cache_salt=salt)).pods
                predictions[name] = pods[0] if pods else None
            unseen = _next_seq(indexers["lossy, no replay"]) != _next_seq(indexers["direct"])
            truth, output = engine.complete(prompt, output_tokens, salt)
            workload.answered(chat, output)
            hits["prompt"] += len(prompt)
            hits["cached"] += truth
            for name, pod in predictions.items():
                tallies[name].add(
                    pod,
                    truth,
                    after_reset=after_reset,
                    unseen_loss=unseen and name == "lossy, no replay",
                    what=f"request {number}",
                )
            after_reset = False
            if number % 25 == 24:
                print(
                    f"{number + 1} requests: " + "; ".join(f"{n} {t.exact}/{t.wrong}" for n, t in tallies.items()), flush=True
                )
        return {
            "requests": requests,
            "prompt_tokens": hits["prompt"],
            "cached_tokens": hits["cached"],
            "kills": kills,
            "resets": resets,
            "frames_passed": proxy.passed,
            "frames_dropped": proxy.dropped,
            "vllm_startup_s": [round(seconds, 1) for seconds in startup_s],
            "run_s": round(time.monotonic() - started, 1),
            "indexers": {
                name: msgspec.to_builtins(tally)
                | {
                    "gaps": sum(pod.gaps for pod in indexers[name].pods()),
                    "replays": sum(pod.replays for pod in indexers[name].pods()),
                    "restarts": sum(pod.restarts for pod in indexers[name].pods()),
                }
                for name, tally in tallies.items()
            },
        }
    finally:
        for indexer in indexers.values():
            indexer.close()
        stop_proxy()
        engine.kill()


def _start_proxy(upstream: str, drop_share: float, seed: int) -> tuple[LossyProxy, object]:
    loop = asyncio.new_event_loop()
    made: list[LossyProxy] = []
    ready = threading.Event()

    async def main() -> None:
        made.append(LossyProxy(upstream, drop_share, seed))
        ready.set()
        await made[0].run()

    def target() -> None:
        with contextlib.suppress(RuntimeError):  # stopped
            loop.run_until_complete(main())

    threading.Thread(target=target, daemon=True).start()
    ready.wait()
    return made[0], lambda: loop.call_soon_threadsafe(loop.stop)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare predictions with a real vLLM's cached_tokens.")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--resets", type=int, default=6)
    parser.add_argument("--drop", type=float, default=0.1, help="share of frames that the proxy drops")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("vllm.log"))
    given = parser.parse_args()
    result = run(given.requests, given.kills, given.resets, given.drop, given.seed, given.log)
    print(json.dumps(result, indent=2))
    wrong = sum(tally["wrong"] for tally in result["indexers"].values())  # type: ignore[attr-defined]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
