"""A fleet on a virtual clock: engines with block caches, FIFO prefill queues and decode slots behind a real Router.

Everything is seeded and nothing waits, so that a scenario of minutes runs in well under a second and comes out the same each
time. A prompt is a tuple of block names; equal leading names are a shared prefix.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import EngineReport
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Flight, Router
from kvatlas.types import PodId

BLOCK_TOKENS = 64
Blocks = tuple[int, ...]


@dataclass(frozen=True)
class EngineSpec:
    """What an engine can do."""

    rate: float = 8_000.0
    """Prompt tokens a second."""
    step_s: float = 0.012
    """Fixed cost of one engine step, which computes at most ``chunk_tokens`` of the prompts in its queue."""
    chunk_tokens: int = 2_048
    slowdown_a_decode: float = 0.004
    """Share by which each decoding request slows a step."""
    tpot_s: float = 0.02
    slots: int = 64
    """Requests that are prefilled or decoded at the same time; others wait."""
    cache_blocks: int = 4_000
    """KV blocks, of running requests and cached ones together."""


@dataclass
class Turn:
    """One request that somebody makes."""

    at_s: float
    blocks: Blocks
    output_tokens: int
    session: int | None = None
    gone_after_s: float | None = None
    """The client gives up if there is no token by then."""
    prompt_tokens: int = 0
    """By default those of the blocks: of ``BLOCK_TOKENS`` each."""

    def __post_init__(self) -> None:
        self.prompt_tokens = self.prompt_tokens or len(self.blocks) * BLOCK_TOKENS


@dataclass
class Job:
    """A request at an engine."""

    turn: Turn
    flight: Flight
    sent_s: float
    cached: int = 0
    left: int = 0
    ttft_s: float | None = None
    gone: bool = False


class Engine:
    """FIFO prefill in chunks, an LRU of blocks, decode slots. Emits cache events into ``feed``."""

    def __init__(self, name: str, spec: EngineSpec, fleet: Fleet) -> None:
        self.name = EndpointName(name)
        self.spec = spec
        self.fleet = fleet
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.waiting: deque[Job] = deque()
        self.prefilling: deque[Job] = deque()
        self.decoding = 0
        self.resident_tokens = 0
        self.stepping = False
        self.feed: deque[tuple[float, int, bool]] = deque()
        """(time, block, stored or removed)."""

    @property
    def running(self) -> int:
        return self.decoding + len(self.prefilling)

    def held(self, blocks: Blocks) -> int:
        return sum(1 for _ in itertools.takewhile(self.cache.__contains__, blocks))

    def take(self, job: Job) -> None:
        self.waiting.append(job)
        self.pump()

    def pump(self) -> None:
        """Begin a step if there is work and none is under way: prompts in their order, as far as the step's tokens go."""
        if self.stepping:
            return
        budget = self.spec.chunk_tokens
        done: list[Job] = []
        while budget and (job := self._next(done)) is not None:
            part = min(budget, job.left)
            job.left -= part
            budget -= part
            if job.left == 0:
                done.append(job)
                self.store(job.turn.blocks)
        if budget < self.spec.chunk_tokens:
            self.stepping = True
            spec = self.spec
            took = (spec.step_s + (spec.chunk_tokens - budget) / spec.rate) * (1 + spec.slowdown_a_decode * self.decoding)
            self.fleet.at(self.fleet.now_s + took, lambda: self._stepped(done))

    def _next(self, done: list[Job]) -> Job | None:
        """Return the prompt to go on with: one that was begun, else the first that waits and fits. It is looked up now."""
        if len(self.prefilling) > len(done):
            return self.prefilling[len(done)]
        spec = self.spec
        while self.waiting and self.waiting[0].gone and self.waiting[0].turn.gone_after_s is not None:
            self.waiting.popleft()
        if not self.waiting or self.running >= spec.slots:
            return None
        job = self.waiting[0]
        tokens = job.turn.prompt_tokens
        need = tokens + job.turn.output_tokens
        if self.running and self.resident_tokens + need > spec.cache_blocks * BLOCK_TOKENS:
            return None
        self.waiting.popleft()
        self.resident_tokens += need
        held = self.held(job.turn.blocks)
        for block in job.turn.blocks[:held]:
            self.cache.move_to_end(block)
        job.cached = min(held * BLOCK_TOKENS, tokens - 1)
        job.left = tokens - job.cached
        self.prefilling.append(job)
        return job

    def _stepped(self, done: list[Job]) -> None:
        self.stepping = False
        for job in done:
            self.prefilling.remove(job)
            if not job.gone:
                job.ttft_s = self.fleet.now_s - job.sent_s
                job.flight.first_token(job.ttft_s)
            self.decoding += 1
            left_s = 0.0 if job.gone and job.turn.gone_after_s is not None else job.turn.output_tokens * self.spec.tpot_s
            self.fleet.at(self.fleet.now_s + left_s, lambda job=job: self._finished(job))  # type: ignore[misc]
        self.pump()

    def _finished(self, job: Job) -> None:
        self.decoding -= 1
        self.resident_tokens -= job.turn.prompt_tokens + job.turn.output_tokens
        if not job.gone:
            self.fleet.finished(self, job)
        self.pump()

    def store(self, blocks: Blocks) -> None:
        for block in blocks:
            if block in self.cache:
                self.cache.move_to_end(block)
            else:
                self.cache[block] = None
                self.feed.append((self.fleet.now_s, block, True))
        while len(self.cache) > self.spec.cache_blocks:
            block, _ = self.cache.popitem(last=False)
            self.feed.append((self.fleet.now_s, block, False))

    def report(self) -> EngineReport:
        spec = self.spec
        return EngineReport(
            at_s=self.fleet.now_s,
            waiting=len(self.waiting),
            running=self.running,
            kv_usage=min(1.0, self.resident_tokens / (spec.cache_blocks * BLOCK_TOKENS)),
            block_size_tokens=BLOCK_TOKENS,
            gpu_blocks=spec.cache_blocks,
        )


@dataclass
class Result:
    """What users saw."""

    ttfts_s: list[float] = field(default_factory=list)
    cached: int = 0
    prompt: int = 0
    by_engine: dict[str, int] = field(default_factory=dict)
    arrivals: list[tuple[float, str, float | None]] = field(default_factory=list)
    """(time, engine, TTFT) in the order of sending; None: no token seen."""

    @property
    def mean_s(self) -> float:
        return sum(self.ttfts_s) / len(self.ttfts_s)

    @property
    def p90_s(self) -> float:
        return sorted(self.ttfts_s)[int(0.9 * len(self.ttfts_s))]

    @property
    def hit_ratio(self) -> float:
        return self.cached / max(1, self.prompt)

    def __str__(self) -> str:
        return f"mean {self.mean_s:6.3f}  p90 {self.p90_s:6.3f}  hits {self.hit_ratio:4.0%}  {self.by_engine}"


class Fleet:
    """Engines, users and a clock. ``report_every_s`` None: engines never say anything."""

    def __init__(
        self,
        specs: Mapping[str, EngineSpec],
        *,
        report_every_s: float | None = 0.05,
        warm_up: int = 0,
        engine: type[Engine] | None = None,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.now_s = 0.0
        self.block_tokens = block_tokens
        self.engines = {EndpointName(name): (engine or Engine)(name, spec, self) for name, spec in specs.items()}
        self.result = Result()
        self.prompts: dict[str, Blocks] = {}
        """Prompts of requests that are being decided, by request id."""
        self.router: Router | None = None
        self.next_turn: Callable[[Turn, float], Turn | None] = lambda turn, now_s: None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ids = itertools.count()
        self._report_every_s = report_every_s
        self._reporting = False
        self._warm_up = warm_up
        self._open = 0

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), action))

    def join(self, name: str, spec: EngineSpec) -> None:
        """Add an engine to the running fleet."""
        self.engines[EndpointName(name)] = Engine(name, spec, self)
        self._pool()

    def elsewhere(self, engine: str, turn: Turn) -> None:
        """Send a request to an engine past the router, as another router would."""
        self.engines[EndpointName(engine)].take(Job(turn, _Nobody(), self.now_s, gone=True))  # type: ignore[arg-type]

    def run(self, router: Router, turns: Sequence[Turn]) -> Result:
        """Play the turns, and those that follow them, to their end."""
        self.router = router
        self._pool()
        for turn in turns:
            self._plan(turn)
        if self._report_every_s is not None and not self._reporting:
            self._reporting = True
            self._reports()
        while self._events and self._open:
            self.now_s, _, action = heapq.heappop(self._events)
            action()
        return self.result

    def finished(self, engine: Engine, job: Job) -> None:
        turn = job.turn
        self.result.cached += job.cached
        job.flight.finished(
            Outcome(
                end=End.DONE,
                ttft_s=job.ttft_s,
                duration_s=self.now_s - job.sent_s,
                prompt_tokens=turn.prompt_tokens,
                cached_tokens=job.cached,
                output_tokens=turn.output_tokens,
            )
        )
        self._done(job)
        if (following := self.next_turn(turn, self.now_s)) is not None:
            self._plan(following)

    def _plan(self, turn: Turn) -> None:
        self._open += 1
        self.at(turn.at_s, lambda: self._send(turn))

    def _send(self, turn: Turn) -> None:
        assert self.router is not None
        name = f"r{next(self._ids)}"
        self.prompts[name] = turn.blocks
        request = RouteRequest(id=name, model="m", prompt_tokens_estimated=turn.prompt_tokens)
        flight = self.router.decide(request)
        del self.prompts[name]
        engine = self.engines[flight.endpoint]
        job = Job(turn, flight, self.now_s)
        self.result.by_engine[engine.name] = self.result.by_engine.get(engine.name, 0) + 1
        if turn.gone_after_s is not None:
            self.at(self.now_s + turn.gone_after_s, lambda: self._give_up(job))
        engine.take(job)

    def _give_up(self, job: Job) -> None:
        if job.ttft_s is None:
            job.gone = True
            job.flight.finished(Outcome(end=End.CLIENT_GONE, duration_s=self.now_s - job.sent_s))
            self._done(job)

    def _done(self, job: Job) -> None:
        self._open -= 1
        result = self.result
        result.prompt += job.turn.prompt_tokens
        result.arrivals.append((job.sent_s, str(job.flight.endpoint), job.ttft_s))
        if job.ttft_s is not None and len(result.arrivals) > self._warm_up:
            result.ttfts_s.append(job.ttft_s)

    def _pool(self) -> None:
        assert self.router is not None
        self.router.set_endpoints([Endpoint(name=name, address=str(name), port=8000, pod=PodId(name)) for name in self.engines])

    def _reports(self) -> None:
        assert self.router is not None
        assert self._report_every_s is not None
        for engine in self.engines.values():
            self.router.report(engine.name, engine.report())
        self.at(self.now_s + self._report_every_s, self._reports)


class _Nobody:
    def first_token(self, ttft_s: float) -> None: ...


# -- workloads ----------------------------------------------------------------------------------------------------------


def shared_prefix(
    seed: int, *, requests: int, per_s: float, groups: int = 12, prefix: int = 40, own: tuple[int, int] = (2, 12)
) -> list[Turn]:
    """Open loop: prompts of a few long prefixes, some much more popular than others, each with an end of its own."""
    rng, names, at_s, turns = random.Random(seed), itertools.count(), 0.0, []
    prefixes = [tuple(next(names) for _ in range(prefix)) for _ in range(groups)]
    weights = [1 / (rank + 1) for rank in range(groups)]
    for _ in range(requests):
        at_s += rng.expovariate(per_s)
        chosen = rng.choices(prefixes, weights)[0]
        turns.append(Turn(at_s, chosen + tuple(next(names) for _ in range(rng.randint(*own))), rng.randint(20, 120)))
    return turns


def no_reuse(seed: int, *, requests: int, per_s: float) -> list[Turn]:
    """Open loop: prompts that share nothing, of very different lengths."""
    rng, names, at_s, turns = random.Random(seed), itertools.count(), 0.0, []
    for _ in range(requests):
        at_s += rng.expovariate(per_s)
        length = min(250, max(2, int(rng.lognormvariate(2.8, 1.0))))
        turns.append(Turn(at_s, tuple(next(names) for _ in range(length)), rng.randint(20, 120)))
    return turns


class Sessions:
    """Closed loop: chats whose every turn repeats all before it. Use ``next_turn`` as the fleet's."""

    def __init__(self, seed: int, *, sessions: int, per_s: float, turns: int = 6, think_s: float = 3.0) -> None:
        self._rng = random.Random(seed)
        self._names = itertools.count()
        self._left = dict.fromkeys(range(sessions), turns - 1)
        self._think_s = think_s
        system = self._new(8)
        at_s, self.first = 0.0, []
        for session in range(sessions):
            at_s += self._rng.expovariate(per_s)
            self.first.append(Turn(at_s, system + self._new(self._rng.randint(4, 30)), self._rng.randint(20, 120), session))

    def next_turn(self, turn: Turn, now_s: float) -> Turn | None:
        if turn.session is None or not self._left[turn.session]:
            return None
        self._left[turn.session] -= 1
        blocks = turn.blocks + self._new(self._rng.randint(4, 16))
        return Turn(now_s + self._rng.expovariate(1 / self._think_s), blocks, self._rng.randint(20, 120), turn.session)

    def _new(self, blocks: int) -> Blocks:
        return tuple(next(self._names) for _ in range(blocks))
