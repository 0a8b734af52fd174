"""Where routers send the requests of real traces, and what that does to cache hits and times to first token.

Four engines with prefix caches much smaller than what the sessions need replay the packaged traces, closed loop: so many users,
each with one session after the other, each request when the one before has been answered and a pause is over. The same
requests and pauses for every router, in front of fresh engines (``kvatlas engine``). They compute nothing: they take as long
as steps of a batch would, for the tokens that are not in their cache and for each token that they write. Their rates
are so low that this waiting is what users see, and not this machine's two cores. Hits are what the engines count themselves.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import URLError

import aiohttp
import msgspec

from benchmarks.result import Result, against, percentile
from benchmarks.sides import BaselineError, Placement
from benchmarks.sides.engines import Counts, EngineHost, counts, engine_host
from benchmarks.sides.routers import MODEL, START_S, free_port, router
from benchmarks.sides.sessions import Request, Session, mooncake, next_sessions, taubench
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.live.server import Started

NAME = "routing_live"
OURS = "kvatlas"
NO_EVENTS = "kvatlas without events"
TURNS = "round robin"
SIDES = (OURS, NO_EVENTS, TURNS, "sglang-router 0.3.2", "vllm-router 0.1.17", "smg 1.13.0")
ENGINES = 4
SEED = 1
TOKEN_S = 0.01
STEP_TOKENS_MAX = 64
"""A prompt is computed in chunks of so many tokens, as engines do, so that it does not hold up those who write for long."""
REQUEST_S_MAX = 120


class Workload(msgspec.Struct, frozen=True):
    """A trace, and engines that it is too much for."""

    name: str
    sessions: Callable[[int, int], list[Session]]
    cache_blocks: int
    """Of 16 tokens, an engine."""
    prefill_tokens_per_s: float

    @property
    def engine(self) -> EngineSpec:
        costs = EngineCosts(step_s=TOKEN_S, prefill_token_s=1 / self.prefill_tokens_per_s)
        return EngineSpec(costs=costs, gpu_blocks=self.cache_blocks, step_tokens_max=STEP_TOKENS_MAX)


class Case(msgspec.Struct, frozen=True):
    """How many users there are, and how long they pause on average."""

    name: str
    users: int
    pause_s: float
    requests: int
    quick_requests: int

    def size(self, *, quick: bool) -> int:
        return self.quick_requests if quick else self.requests


class Seen(msgspec.Struct, frozen=True):
    """What users and engines saw through one router."""

    ttfts_s: list[float]
    took_s: float
    failed: int
    counts: Counts
    by_engine: list[float]

    @property
    def hit_ratio(self) -> float:
        return self.counts.cached_tokens / max(1, self.counts.prompt_tokens)

    @property
    def mean_s(self) -> float:
        return sum(self.ttfts_s) / len(self.ttfts_s)

    def at(self, share: float) -> float:
        return percentile(self.ttfts_s, share)

    @property
    def requests_per_s(self) -> float:
        return len(self.ttfts_s) / self.took_s


WORKLOADS = (Workload("taubench", taubench, 192, 600.0), Workload("mooncake", mooncake, 768, 2_000.0))
CASES = (Case("unsaturated", 8, 0.2, 300, 32), Case("saturated", 32, 0.05, 600, 64))
TURNS_MAX, QUICK_TURNS_MAX = 16, 4
"""Of a session; later ones are left out, so that no session outlasts all others by far."""


def run(*, quick: bool, place: Placement) -> list[Result]:
    """Play both cases through every router; ``quick``: fewer requests of the first trace."""
    results = []
    with engine_host() as host:
        for workload in WORKLOADS[:1] if quick else WORKLOADS:
            seen = {}
            for side in SIDES:
                try:
                    seen[side] = play(host, side, workload, quick=quick)
                except BaselineError as error:
                    if side == OURS:
                        raise
                    print(f"without {side}: {error}", file=sys.stderr)
            for case in CASES:
                results += _compared(f"{workload.name}, {case.name}", {side: cases[case.name] for side, cases in seen.items()})
    return results


def play(host: EngineHost, side: str, workload: Workload, *, quick: bool) -> dict[str, Seen]:
    """Play the cases through one router in front of fresh engines, each with other sessions.

    Raises BaselineError where the router does not come up.
    """
    sessions = iter(workload.sessions(SEED, QUICK_TURNS_MAX if quick else TURNS_MAX))
    with ExitStack() as stack:
        fleet = stack.enter_context(host.engines(ENGINES, workload.engine))
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        targets = stack.enter_context(front(side, fleet, log))
        return {case.name: _played(fleet, case, next_sessions(sessions, case.size(quick=quick)), targets) for case in CASES}


def _played(fleet: Sequence[Started], case: Case, sessions: Sequence[Session], targets: Sequence[str]) -> Seen:
    before = [counts(engine) for engine in fleet]
    began = time.perf_counter()
    answers = asyncio.run(_play(sessions, case, itertools.cycle(targets)))
    took_s = time.perf_counter() - began
    each = [counts(engine).since(then) for engine, then in zip(fleet, before, strict=True)]
    total = Counts(*map(sum, zip(*map(msgspec.structs.astuple, each), strict=True)))
    ttfts_s = [ttft_s for ttft_s in answers if ttft_s is not None]
    return Seen(ttfts_s, took_s, len(answers) - len(ttfts_s), total, [one.finished for one in each])


@contextmanager
def front(side: str, fleet: Sequence[Started], log: Path) -> Iterator[list[str]]:
    """Run what stands between users and engines; yield where users go, in turns."""
    urls = [engine.url for engine in fleet]
    if side == TURNS:
        yield urls
    elif side in (OURS, NO_EVENTS):
        api_port = free_port()
        options = ["--api-port", str(api_port)]
        if side == OURS:
            options += [part for one in fleet for part in ("--engine", f"{one.events},replay={one.replay}")]
        with router(OURS, urls, log, options) as url:
            _wait_until_ready(f"http://127.0.0.1:{api_port}/readyz")
            yield [url]
    else:
        with router(side, urls, log) as url:
            yield [url]


def _wait_until_ready(url: str) -> None:
    """Wait until the tokenizer is loaded and the engines' events are followed."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310  it is ours
                return
        except URLError:
            time.sleep(0.1)
    raise BaselineError(f"{url} does not say that it is ready")


async def _play(sessions: Sequence[Session], case: Case, targets: Iterator[str]) -> list[float | None]:
    """Let users play sessions; return times to first token, None where there was none."""
    left = iter(enumerate(sessions))
    answers: list[float | None] = []
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=REQUEST_S_MAX)
    ) as http:

        async def user() -> None:
            for number, session in left:
                pauses = random.Random(SEED * 100_003 + number)
                for request in session:
                    await asyncio.sleep(pauses.expovariate(1 / case.pause_s))
                    answers.append(await _ask(http, next(targets), request))

        await asyncio.gather(*(user() for _ in range(case.users)))
    return answers


async def _ask(http: aiohttp.ClientSession, url: str, request: Request) -> float | None:
    """Return seconds to the first event of the answer; None where it failed."""
    body = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **request.body}
    began = time.perf_counter()
    try:
        async with http.post(url + request.path, json=body) as answer:
            line = await answer.content.readline()
            ttft_s = time.perf_counter() - began
            await answer.content.read()
            return ttft_s if answer.status == 200 and line.startswith(b"data:") else None
    except (aiohttp.ClientError, TimeoutError):
        return None


def _compared(scenario: str, seen: dict[str, Seen]) -> list[Result]:
    ours = seen[OURS]
    found = []
    for name, theirs in seen.items():
        if name == OURS:
            continue
        reach = None if name == NO_EVENTS else 1.0
        text = f"{scenario}: cached share of prompt tokens"
        found.append(_beside(text, ours.hit_ratio, "tokens/token", name, theirs.hit_ratio, higher=True, reach=reach))
        text = f"{scenario}: TTFT, mean"
        found.append(_beside(text, ours.mean_s * 1e3, "ms", name, theirs.mean_s * 1e3, higher=False, reach=reach))
        for share in (0.5, 0.9):
            text = f"{scenario}: TTFT, p{share * 100:.0f}"
            found.append(_beside(text, ours.at(share) * 1e3, "ms", name, theirs.at(share) * 1e3, higher=False))
        text = f"{scenario}; {ours.failed} failed of ours, {theirs.failed} of theirs"
        found.append(_beside(text, ours.requests_per_s, "req/s", name, theirs.requests_per_s, higher=True))
    return found


def _beside(
    text: str, value: float, unit: str, name: str, theirs: float, *, higher: bool, reach: float | None = None
) -> Result:
    return against(NAME, text, value, unit, name, theirs, higher_is_better=higher, reach=reach)
