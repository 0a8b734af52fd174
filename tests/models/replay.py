"""``benchmarks.routing_live`` on a virtual clock: the same traces, closed loop, before engines of the same kind.

``python -m tests.models.replay [seeds]`` prints cached shares and times to first token of some policies.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from statistics import mean

import msgspec

from benchmarks.result import percentile
from benchmarks.routing_live import CASES, ENGINES, TOKEN_S, TURNS_MAX, WORKLOADS, Case, Workload
from benchmarks.sides.routers import TINY
from benchmarks.sides.sessions import next_sessions
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.load import EngineReport
from kvatlas.route.router import Router
from tests.models.block_cache import BlockCache
from tests.models.engine_prompts import ModelTokens, prompt_tokens
from tests.models.fleet import Engine, EngineSpec, Fleet, Job, Turn
from tests.models.policies import RoundRobin, Truth, router
from tests.models.scenarios import OURS, ours

BLOCK_TOKENS = 16
OVERHEAD_S = 0.002
"""Of a request's way: beside computing and waiting."""


class SerialEngine(Engine):
    """Computes one prompt after the other, as ``tests.models.http_engine`` does; answers beside that."""

    def pump(self) -> None:
        if self.prefilling or not self.waiting:
            return
        job = self.waiting.popleft()
        self.prefilling.append(job)
        tokens, blocks = job.turn.prompt_tokens, job.turn.blocks
        job.cached = min(self.held(blocks), (tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        self.resident_tokens += tokens
        changes = self._keep(blocks)
        self.fleet.at(self.fleet.now_s + (tokens - job.cached) / self.spec.rate, lambda: self._computed(job, changes))

    def _keep(self, blocks: Sequence[int]) -> list[tuple[int, bool]]:
        stored = [(block, True) for block in blocks if block not in self.cache]
        for block in reversed(blocks[: self.spec.cache_blocks]):
            self.cache[block] = None
            self.cache.move_to_end(block)
        excess = len(self.cache) - self.spec.cache_blocks
        return [(self.cache.popitem(last=False)[0], False) for _ in range(excess)] + stored

    def _computed(self, job: Job, changes: Sequence[tuple[int, bool]]) -> None:
        self.prefilling.remove(job)
        self.decoding += 1
        now_s = self.fleet.now_s
        self.feed.extend((now_s, block, stored) for block, stored in changes)
        self.fleet.at(now_s + self.spec.tpot_s + OVERHEAD_S, lambda: self._first_token(job))
        self.fleet.at(now_s + job.turn.output_tokens * self.spec.tpot_s + OVERHEAD_S, lambda: self._finished(job))
        self.pump()

    def _first_token(self, job: Job) -> None:
        job.ttft_s = self.fleet.now_s - job.sent_s
        job.flight.first_token(job.ttft_s)

    def _finished(self, job: Job) -> None:
        self.decoding -= 1
        self.resident_tokens -= job.turn.prompt_tokens
        self.fleet.finished(self, job)

    def report(self) -> EngineReport:
        usage = min(1.0, self.resident_tokens / (self.spec.cache_blocks * BLOCK_TOKENS))
        return EngineReport(
            at_s=self.fleet.now_s,
            waiting=len(self.waiting),
            running=self.running,
            kv_usage=usage,
            block_size_tokens=BLOCK_TOKENS,
            gpu_blocks=self.spec.cache_blocks,
        )


class Users:
    """So many, each with one session after the other."""

    def __init__(self, sessions: Sequence[Sequence[Turn]], case: Case, seed: int, now_s: float) -> None:
        self._left = iter(enumerate(sessions))
        self._case = case
        self._seed = seed
        self._playing: dict[int, Iterator[Turn]] = {}
        self._pauses: dict[int, random.Random] = {}
        begin = (self._begin(now_s) for _ in range(case.users))
        self.first = [turn for turn in begin if turn is not None]

    def next_turn(self, turn: Turn, now_s: float) -> Turn | None:
        assert turn.session is not None
        return self._go_on(turn.session, now_s) or self._begin(now_s)

    def _begin(self, now_s: float) -> Turn | None:
        number, session = next(self._left, (0, None))
        if session is None:
            return None
        self._playing[number] = iter(session)
        self._pauses[number] = random.Random(self._seed * 100_003 + number)
        return self._go_on(number, now_s)

    def _go_on(self, number: int, now_s: float) -> Turn | None:
        turn = next(self._playing[number], None)
        if turn is None:
            return None
        pause_s = self._pauses[number].expovariate(1 / self._case.pause_s)
        return Turn(now_s + pause_s, turn.blocks, turn.output_tokens, number, prompt_tokens=turn.prompt_tokens)


@cache
def sessions_of(workload: str, seed: int) -> list[list[Turn]]:
    """Return a trace's sessions in a seed's order, as blocks."""
    known = next(one for one in WORKLOADS if one.name == workload)
    return [[_turn(request) for request in session] for session in known.sessions(seed, TURNS_MAX)]


_TOKENS = ModelTokens(TINY)
_HASHES = BlockCache(BLOCK_TOKENS)
_MADE: dict[bytes, Turn] = {}


def _turn(request: object) -> Turn:
    key = msgspec.json.encode(request)
    if key not in _MADE:
        tokens = prompt_tokens(_TOKENS, request.path, request.body)
        _MADE[key] = Turn(0.0, tuple(_HASHES._hashes(tokens)), request.body["max_tokens"], prompt_tokens=len(tokens))
    return _MADE[key]


class Remembered:
    """What was sent where, without bounds: what routers that hear no events go by."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.sent: dict[EndpointName, set[int]] = {}

    def share(self, cycle: Cycle, name: EndpointName) -> float:
        blocks, sent = self.fleet.prompts[cycle.request.id], self.sent.setdefault(name, set())
        return next((at for at, block in enumerate(blocks) if block not in sent), len(blocks)) / max(1, len(blocks))


class CacheAware:
    """sglang-router's cache_aware: the longest prefix that was sent somewhere; short ones go to the smallest tree."""

    def __init__(self, fleet: Fleet, threshold: float = 0.3) -> None:
        self._history = Remembered(fleet)
        self._threshold = threshold

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[float]:
        sent = self._history.sent
        shares = [self._history.share(cycle, one.name) for one in candidates]
        requests = [one.load.in_flight.requests for one in candidates]
        if max(requests) - min(requests) > 64 and max(requests) > 1.5 * min(requests):
            return [1 / (1 + one) for one in requests]
        if max(shares) > self._threshold:
            return shares
        return [1 / (1 + len(sent[one.name])) for one in candidates]

    def decided(self, cycle: Cycle, decision: Decision) -> None:
        self._history.sent[decision.target.name] |= set(self._history.fleet.prompts[cycle.request.id])


class LongestPrefix:
    """What events say is held, whatever the queue; equal ones by requests in flight."""

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[float]:
        found = cycle.matches["prefix"]
        return [found.of(one.name).tokens + 1 / (2 + one.load.in_flight.requests) for one in candidates]


class Seen(msgspec.Struct, frozen=True):
    hit_ratio: float
    mean_s: float
    p50_s: float
    p90_s: float


def replay(workload: Workload, policy: str | Callable[[Fleet], object], seed: int) -> dict[str, Seen]:
    """Play both cases, one after the other, with other sessions."""
    spec = EngineSpec(rate=workload.prefill_tokens_per_s, tpot_s=TOKEN_S, cache_blocks=workload.cache_blocks)
    specs = {f"e{at}": spec for at in range(ENGINES)}
    fleet = Fleet(specs, engine=SerialEngine, block_tokens=BLOCK_TOKENS)
    made: dict[str, Callable[[], object]] = {
        "round robin": RoundRobin,
        "cache aware": lambda: CacheAware(fleet),
        "longest prefix": LongestPrefix,
    }
    scorer = policy(fleet) if callable(policy) else made[policy]() if policy in made else None
    by_name = ours(fleet) if scorer is None else {"other": (scorer, 1.0)}
    route: Router = router(fleet, Truth(fleet, speculative_s=2.0), by_name, seed)
    sessions = iter(sessions_of(workload.name, seed))
    seen = {}
    for case in CASES:
        users = Users(next_sessions(sessions, case.requests), case, seed, fleet.now_s)
        fleet.next_turn = users.next_turn
        before = fleet.result
        cached, prompt, count = before.cached, before.prompt, len(before.ttfts_s)
        result = fleet.run(route, users.first)
        ttfts_s = result.ttfts_s[count:]
        hit_ratio = (result.cached - cached) / (result.prompt - prompt)
        seen[case.name] = Seen(hit_ratio, mean(ttfts_s), percentile(ttfts_s, 0.5), percentile(ttfts_s, 0.9))
    return seen


def table(policies: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    for workload in WORKLOADS:
        found = {policy: [replay(workload, policy, seed) for seed in seeds] for policy in policies}
        for case in CASES:
            for policy, seen in found.items():
                rows = [msgspec.structs.astuple(one[case.name]) for one in seen]
                hits, average_s, p50_s, p90_s = (mean(column) for column in zip(*rows, strict=True))
                times = " / ".join(f"{1e3 * one:4.0f}" for one in (average_s, p50_s, p90_s))
                yield f"{workload.name:9} {case.name:11} {policy:15} {hits:6.1%}  {times} ms"


if __name__ == "__main__":
    for line in table(("round robin", "cache aware", "longest prefix", OURS), range(1, 1 + int((sys.argv[1:] or ["3"])[0]))):
        print(line)
