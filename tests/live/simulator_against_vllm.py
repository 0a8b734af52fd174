"""The simulated engine against a real vLLM: the same requests, ``cached_tokens`` compared one by one.

    tests/live/vllm.sh setup                       # once: several GB
    python -m tests.live.simulator_against_vllm    # about three minutes on two cores

One engine with room for 60 blocks is asked for chats with shared prefixes and cache salts: one after the other, then some at
a time. It is reset now and then. The simulated engine gets the same prompts in the same order, with the answers that the real
one gave. Requests of one batch are sent a few milliseconds apart, so that the order in which they come is known; when exactly
each comes, and how long a step of the real engine takes, is not: this can change what is evicted when.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from kvatlas.keys.engine_hashes import UNSET_SEED, HashScheme
from kvatlas.sim.choice import make_engines
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec, Events, Job, Kind
from tests.live.against_vllm import Engine, Workload

SCHEME = HashScheme("sha256_cbor", UNSET_SEED)
SPEC = EngineSpec(
    costs=EngineCosts(step_s=0.01, prefill_token_s=3e-5), gpu_blocks=60, block_size_tokens=32, step_tokens_max=2048
)
APART_S = 0.004


class Request(NamedTuple):
    prompt: list[int]
    output_tokens: int
    salt: str | None
    chat: int


class Simulated:
    """One simulated engine, told what the real one was asked."""

    def __init__(self) -> None:
        self._engines = make_engines()
        self._engine = self._engines.join(SPEC, 0.0)
        self._now_s = 0.0
        self._jobs = 0

    def reset(self) -> None:
        assert self._engines.reset_cache(self._engine, self._now_s)

    def cached_tokens(self, requests: list[Request], answers: list[list[int]]) -> list[int]:
        """Serve requests that come one right after the other; return what was cached of each."""
        first = self._jobs
        for request, answer in zip(requests, answers, strict=True):
            keys = engine_hashes(request.prompt + answer, request.salt)
            self._now_s, _ = self._engines.run(self._now_s)
            self._engines.add(self._engine, Job(self._jobs, keys, len(request.prompt), len(answer)), self._now_s)
            self._jobs += 1
        cached = [0] * len(requests)
        unfinished = len(requests)
        while unfinished:
            self._now_s, happenings = self._engines.run(math.inf, events=Events.NOTHING)
            for happening in happenings:
                if happening.kind is Kind.SCHEDULED:
                    cached[happening.job - first] = happening.first
                unfinished -= happening.kind is Kind.FINISHED
        return cached

    @property
    def preemptions(self) -> int:
        return self._engines.state(self._engine).preemptions


def engine_hashes(tokens: list[int], salt: str | None) -> array[int]:
    size = SPEC.block_size_tokens
    digest = SCHEME.none_hash()
    keys = array("Q")
    for start in range(0, len(tokens) - size + 1, size):
        extra = [("cache_salt", salt)] if salt and start == 0 else []
        digest = SCHEME.block_hash(digest, tokens[start : start + size], extra)
        keys.append(int.from_bytes(digest[-8:], "big"))
    return keys


def ask(engine: Engine, requests: list[Request], pool: ThreadPoolExecutor) -> list[tuple[int, list[int]]]:
    """Return (cached tokens, answer) of each request; they are sent in this order, a moment apart."""
    futures = []
    for request in requests:
        futures.append(pool.submit(engine.complete, request.prompt, request.output_tokens, request.salt))
        time.sleep(APART_S)
    return [future.result() for future in futures]


def run(requests: int, at_once: int, resets: int, seed: int, engine: Engine) -> dict[str, object]:
    """Send ``requests`` in batches of 1 to ``at_once``; return what was equal, and what was not."""
    workload, simulated = Workload(seed), Simulated()
    exact, cached, sent = 0, 0, 0
    different: list[str] = []
    reset_each = requests // (resets + 1)
    with ThreadPoolExecutor(at_once) as pool:
        while sent < requests:
            if sent // reset_each != (sent - 1) // reset_each and sent:
                engine.reset()
                simulated.reset()
            batch = [Request(*workload.next()) for _ in range(1 + sent % at_once)]
            answers = ask(engine, batch, pool)
            expected = simulated.cached_tokens(batch, [answer for _, answer in answers])
            for request, (truth, answer), simulation in zip(batch, answers, expected, strict=True):
                workload.answered(request.chat, answer)
                exact += truth == simulation
                cached += truth
                if truth != simulation:
                    different.append(f"request {sent}: simulated {simulation}, engine {truth} of {len(request.prompt)}")
                sent += 1
    return {
        "requests": sent,
        "at_once": at_once,
        "exact": exact,
        "cached_tokens": cached,
        "preemptions_simulated": simulated.preemptions,
        "different": different,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a simulated engine with a real vLLM.")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--resets", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("vllm.log"))
    given = parser.parse_args()
    results = []
    for at_once in given.at_once:
        engine = Engine(given.log)
        print(f"starting vLLM (log: {given.log}) ...", flush=True)
        engine.start()
        try:
            results.append(run(given.requests, at_once, given.resets, given.seed, engine))
        finally:
            engine.kill()
        print(json.dumps(results[-1], indent=2), flush=True)
    sys.exit(any(result["different"] for result in results if result["at_once"] == 1))


if __name__ == "__main__":
    main()
