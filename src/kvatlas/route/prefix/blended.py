"""``blended-prefix-cache-producer``: events where they can be relied on, else history; each match says which.

- Tokens known and the endpoint's events fresh: what events say. History knows nothing that they don't.
- Events stale: the larger of the two. Neither speaks of what is missing: events miss blocks that were stored unseen, history
  misses what others routed there or came before it. Both may count blocks that the engine has evicted, but for what is held
  they are witnesses, and the smaller would believe neither. To believe too much costs computing a prefix at an idle endpoint
  instead of another; to believe too little costs the same, and leaves a second copy. The doubt is in what the match is worth:
  the index weighs what stale streams hold (``ingest.staleWeight``), so a fresh endpoint that holds as much is ahead.
- No events, or no tokens: history.

Blocks are those of the index, except where all is from history: its matches are cut down to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.matches import PrefixMatch, PrefixMatches
from kvatlas.route.outcome import Outcome
from kvatlas.route.parameters import GoDuration
from kvatlas.route.plugins import Services
from kvatlas.route.prefix.approximate import ApproximatePrefixCache
from kvatlas.route.prefix.history import HistoryStats
from kvatlas.route.prefix.lag import EventLag
from kvatlas.route.prefix.precise import SPECULATIVE_TTL_S, SPECULATIVE_TTL_S_MAX, PrecisePrefixCache


class BlendedPrefixCache:
    """Holds one producer of each kind. History is kept of all endpoints, so that there is one when events fail."""

    class Parameters(ApproximatePrefixCache.Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
        speculative_indexing: bool = True
        speculative_ttl: GoDuration = msgspec.field(default=GoDuration(SPECULATIVE_TTL_S), name="speculativeTTL")
        speculative_ttl_max: GoDuration = msgspec.field(default=GoDuration(SPECULATIVE_TTL_S_MAX), name="speculativeTTLMax")

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        """Raises ConfigError as the producers of each kind do."""
        self.name = name
        self._history = ApproximatePrefixCache(name, parameters, services)
        events = PrecisePrefixCache.Parameters(
            speculative_indexing=parameters.speculative_indexing,
            speculative_ttl=parameters.speculative_ttl,
            speculative_ttl_max=parameters.speculative_ttl_max,
        )
        # who was not heard of has a history; a promise would look like events that came
        self._events = PrecisePrefixCache(name, events, services, promise_unheard=False)

    @property
    def lag(self) -> EventLag:
        """How long its promises last."""
        return self._events.lag

    def produce(self, cycle: Cycle) -> None:
        self._history.remember(cycle)
        found = self._events.find(cycle)
        if found is None:
            found = self._history.find(cycle)
        elif not _all_fresh(cycle, found):
            history = self._history.find(cycle)
            found = found if history is None else _blend(cycle, found, history)
        if found is not None:
            cycle.matches[self.name] = found

    def decided(self, cycle: Cycle, decision: Decision) -> None:
        self._history.decided(cycle, decision)
        self._events.decided(cycle, decision)

    def finished(self, decision: Decision, endpoint: EndpointName, outcome: Outcome) -> None:
        self._history.finished(decision, endpoint, outcome)

    def told(self, cycle: Cycle) -> dict[str, Sequence[int]]:
        return {**self._history.told(cycle), **self._events.told(cycle)}

    def learn(self, kind: str, candidates: Sequence[Candidate], chain: Sequence[int], now_s: float) -> None:
        self._history.learn(kind, candidates, chain, now_s)
        self._events.learn(kind, candidates, chain, now_s)

    def pool_changed(self, endpoints: Sequence[Endpoint]) -> None:
        self._history.pool_changed(endpoints)
        self._events.pool_changed(endpoints)

    def stats(self) -> HistoryStats:
        """Return the sizes of its history."""
        return self._history.stats()


def _all_fresh(cycle: Cycle, events: PrefixMatches) -> bool:
    """Whether events say what every candidate holds, and can be relied on."""
    return all(
        (told := events.by_endpoint.get(one.endpoint.name)) is not None and told.stale is None for one in cycle.candidates
    )


def _blend(cycle: Cycle, events: PrefixMatches, history: PrefixMatches) -> PrefixMatches:
    found: dict[EndpointName, PrefixMatch] = {}
    for candidate in cycle.candidates:
        name = candidate.endpoint.name
        told = events.by_endpoint.get(name)
        if told is not None and told.stale is None:
            found[name] = told
            continue
        routed = history.by_endpoint.get(name)
        if routed is not None:
            whole = min(routed.tokens // events.block_size_tokens, events.blocks) * events.block_size_tokens
            routed = msgspec.structs.replace(routed, tokens=whole)
        chosen = routed if told is None else _larger(told, routed)
        if chosen is not None:
            found[name] = chosen
    return PrefixMatches(found, events.block_size_tokens, events.blocks)


def _larger(told: PrefixMatch, routed: PrefixMatch | None) -> PrefixMatch:
    """Return a stale endpoint's match; it is worth what the better witness says."""
    if routed is None or not routed.tokens:
        return told
    if routed.tokens > told.tokens:
        return msgspec.structs.replace(routed, stale=told.stale)
    return told if told.worth >= routed.worth else msgspec.structs.replace(told, worth_tokens=routed.worth)
