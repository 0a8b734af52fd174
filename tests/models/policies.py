"""Routing policies to compare with, from their published formulas, and what finds prefixes for them in a test fleet."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision, ProfileRun
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.plugins import Conclusion
from kvatlas.route.profile import Profile, WeightedScorer
from kvatlas.route.router import Router
from kvatlas.route.scheduler import NamedProducer, Scheduler
from tests.models.fleet import BLOCK_TOKENS, Fleet

SPECULATIVE_S = 20.0
"""How long what was sent somewhere counts as held there, unless an event comes first: longer than queues are."""


class Truth:
    """What engines hold, as their events told ``lag_s`` later, with speculative entries for what was just sent there."""

    def __init__(self, fleet: Fleet, lag_s: float = 0.0, speculative_s: float = SPECULATIVE_S) -> None:
        self._fleet = fleet
        self._lag_s = lag_s
        self._speculative_s = speculative_s
        self._known: dict[EndpointName, set[int]] = {}
        self._sent: dict[EndpointName, dict[int, float]] = {}

    def produce(self, cycle: Cycle) -> None:
        blocks = self._fleet.prompts[cycle.request.id]
        found = {}
        for name, engine in self._fleet.engines.items():
            known, sent = self._known.setdefault(name, set()), self._sent.setdefault(name, {})
            while engine.feed and engine.feed[0][0] <= cycle.now_s - self._lag_s:
                _, block, stored = engine.feed.popleft()
                (known.add if stored else known.discard)(block)
                sent.pop(block, None)
            count = 0
            for block in blocks:
                if block not in known and sent.get(block, 0.0) < cycle.now_s:
                    break
                count += 1
            if count:
                found[name] = PrefixMatch(count * self._fleet.block_tokens, MatchSource.EVENTS)
        cycle.matches["prefix"] = PrefixMatches(found, self._fleet.block_tokens, len(blocks))

    def decided(self, cycle: Cycle, decision: Decision) -> None:
        sent = self._sent[decision.target.name]
        for block in self._fleet.prompts[cycle.request.id]:
            sent[block] = cycle.now_s + self._speculative_s


class History:
    """What was routed where: an LRU an endpoint, of a size that need not be the engine's."""

    def __init__(self, fleet: Fleet, blocks_max: int) -> None:
        self._fleet = fleet
        self._blocks_max = blocks_max
        self._routed: dict[EndpointName, OrderedDict[int, None]] = {}

    def produce(self, cycle: Cycle) -> None:
        blocks = self._fleet.prompts[cycle.request.id]
        found = {}
        for name in self._fleet.engines:
            routed = self._routed.setdefault(name, OrderedDict())
            count = next((i for i, block in enumerate(blocks) if block not in routed), len(blocks))
            if count:
                found[name] = PrefixMatch(count * self._fleet.block_tokens, MatchSource.HISTORY)
        cycle.matches["prefix"] = PrefixMatches(found, self._fleet.block_tokens, len(blocks))

    def decided(self, cycle: Cycle, decision: Decision) -> None:
        routed = self._routed[decision.target.name]
        for block in self._fleet.prompts[cycle.request.id]:
            routed[block] = None
            routed.move_to_end(block)
        while len(routed) > self._blocks_max:
            routed.popitem(last=False)


class RoundRobin:
    def __init__(self) -> None:
        self._next = -1

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[float]:
        self._next = (self._next + 1) % len(candidates)
        return [float(at == self._next) for at in range(len(candidates))]


class LeastRequests:
    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[float]:
        return [1 / (1 + candidate.load.in_flight.requests) for candidate in candidates]


class Prefix:
    """llm-d's prefix-cache-scorer: blocks held over all blocks."""

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[float]:
        found = cycle.matches["prefix"]
        return [found.of(candidate.name).tokens / (found.blocks * BLOCK_TOKENS) for candidate in candidates]


class Queue:
    """llm-d's queue-scorer."""

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[float]:
        waiting = [0 if candidate.load.report is None else candidate.load.report.waiting for candidate in candidates]
        low, high = min(waiting), max(waiting)
        return [1.0 if low == high else (high - one) / (high - low) for one in waiting]


class KvFree:
    """llm-d's kv-cache-utilization-scorer."""

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[float]:
        return [1.0 - (0 if candidate.load.report is None else candidate.load.report.kv_usage) for candidate in candidates]


class Best:
    """llm-d's max-score-picker: equal totals are spread by chance."""

    def pick(self, cycle: Cycle, candidates: Sequence[Candidate], totals: Sequence[float]) -> Sequence[Candidate]:
        order = list(range(len(candidates)))
        cycle.random.shuffle(order)
        return [candidates[max(order, key=totals.__getitem__)]]


class Single:
    """Runs the only profile."""

    def next_profiles(
        self, cycle: Cycle, profiles: Mapping[str, Profile], runs: Mapping[str, ProfileRun | None]
    ) -> Sequence[str]:
        return () if runs else tuple(profiles)

    def conclude(self, cycle: Cycle, runs: Mapping[str, ProfileRun | None]) -> Conclusion | None:
        return Conclusion(next(iter(runs)))


def scorers(policy: str) -> dict[str, tuple[object, float]]:
    """Return a published policy's scorers with their weights."""
    known: dict[str, dict[str, tuple[object, float]]] = {
        "round robin": {"turns": (RoundRobin(), 1.0)},
        "least requests": {"least": (LeastRequests(), 1.0)},
        "prefix only": {"prefix": (Prefix(), 1.0)},
        "llm-d": {"queue": (Queue(), 2.0), "kv": (KvFree(), 2.0), "prefix": (Prefix(), 3.0)},
    }
    return known[policy]


def router(fleet: Fleet, producer: object, by_name: Mapping[str, tuple[object, float]], seed: int) -> Router:
    """Return a router of one profile that picks the best total."""

    def failed(name: str, error: Exception) -> None:
        raise error

    weighted = tuple(WeightedScorer(name, scorer, weight) for name, (scorer, weight) in by_name.items())  # type: ignore[arg-type]
    profile = Profile("default", (), weighted, Best())
    scheduler = Scheduler((NamedProducer("prefix", producer),), {"default": profile}, Single(), failed=failed)  # type: ignore[arg-type]
    plugins = {"producer": producer} | {name: scorer for name, (scorer, _) in by_name.items()}
    return Router(scheduler, plugins, clock=lambda: fleet.now_s, random=random.Random(seed))
