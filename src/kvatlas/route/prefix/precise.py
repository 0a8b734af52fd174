"""``precise-prefix-cache-producer``: prefixes as the index knows them from engines' events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import msgspec

from kvatlas.errors import ConfigError, RequestError
from kvatlas.indexer import Indexer
from kvatlas.results import Query
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.parameters import GoDuration
from kvatlas.route.plugins import Services
from kvatlas.route.prefix.lag import EventLag
from kvatlas.route.prefix.llmd_index import IndexerConfig, KvEventsConfig, LlmdIndex, TokenProcessorConfig
from kvatlas.route.prefix.streams import KnownStreams, StreamNames
from kvatlas.route.request import RouteRequest
from kvatlas.types import GPU, BlockKey, PromptScores, Stream, StreamScore

SPECULATIVE_TTL_S = 2.0
SPECULATIVE_TTL_S_MAX = 30.0
PROMISED = "promised"
"""What chains that routers tell each other are of: keys of the index."""
_NAMED_MAX = 3
"""Endpoints that a note names; of more it says how many."""


class PrecisePrefixCache:
    """Asks the index. Between a decision and the events that it leads to, promised blocks stand in for them.

    Source: llm-d-router, precise-prefix-cache-producer.
    """

    class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
        token_processor_config: TokenProcessorConfig | None = None
        indexer_config: IndexerConfig | None = None
        kv_events_config: KvEventsConfig | None = None
        speculative_indexing: bool = False
        """Count the blocks of a request that was sent to an endpoint as held there until events confirm them."""
        speculative_ttl: GoDuration = msgspec.field(default=GoDuration(SPECULATIVE_TTL_S), name="speculativeTTL")
        """How long at least; 0 is the default. It becomes longer where events are seen to take longer."""
        speculative_ttl_max: GoDuration = msgspec.field(default=GoDuration(SPECULATIVE_TTL_S_MAX), name="speculativeTTLMax")
        """How long at most; not in llm-d."""

    def __init__(self, name: str, parameters: Parameters, services: Services, *, promise_unheard: bool = True) -> None:
        """``promise_unheard``: promise blocks also to endpoints of which no event has come yet.

        Raises ConfigError where the longest time to live is the shorter one, and for keys that others could not find.
        """
        self.name = name
        self._keys = f"{name} keys"
        self._promised = f"{name} promised"
        self._index: Indexer | None = services.index
        given = LlmdIndex(parameters.token_processor_config, parameters.indexer_config, parameters.kv_events_config)
        self.notes: tuple[str, ...] = () if self._index is None else given.compare(name, self._index.config)
        """What of the parameters has no effect."""
        ttl_s, ttl_s_max = parameters.speculative_ttl or SPECULATIVE_TTL_S, parameters.speculative_ttl_max
        if ttl_s > ttl_s_max:
            raise ConfigError(
                f"{name}.speculativeTTLMax", f"{ttl_s_max:g}s is less than speculativeTTL", f"at least {ttl_s:g}s"
            )
        self._speculates = parameters.speculative_indexing
        self._promise_unheard = promise_unheard
        self._names = StreamNames()
        self._known = None if self._index is None else KnownStreams(self._index.index)
        self.lag = EventLag(ttl_s, ttl_s_max, self._holds)

    def produce(self, cycle: Cycle) -> None:
        found = self.find(cycle)
        if found is not None:
            cycle.matches[self.name] = found

    def find(self, cycle: Cycle) -> PrefixMatches | None:
        """Return what events say of candidates; those of which they say nothing are missing.

        None where they say nothing of anybody, and where the index can't be asked. A note says so.
        """
        request = cycle.request
        if self._index is None or request.token_ids is None:
            why = "there is no index" if self._index is None else f"the tokens are not known ({_why(request)})"
            cycle.notes.append(f"{self.name}: {why}, so nothing is matched by events")
            return None
        try:
            scores = self._index.match(_query(request))
        except RequestError as error:
            cycle.notes.append(f"{self.name}: {error}; so nothing is matched by events")
            return None
        cycle.kept[self._keys] = scores.keys
        self.lag.look(cycle.now_s)
        size = self._index.config.keys.block_size
        found = self._matches(cycle, scores, size)
        blocks = scores.blocks if request.tokens_complete else max(scores.blocks, request.prompt_tokens // size)
        return PrefixMatches(found, size, blocks) if found else None

    def decided(self, cycle: Cycle, decision: Decision) -> None:
        """Promise the prompt's blocks to who computes it, and to who gets them then."""
        keys: Sequence[BlockKey] | None = cycle.kept.get(self._keys)
        if not self._speculates or not keys or self._index is None:
            return
        computes, target = decision.computes_prompt, decision.target
        chosen = (computes,) if computes.name == target.name else (computes, target)
        found = cycle.matches.get(self.name)
        # where events say already that an endpoint holds every block there is nothing to promise
        confirmed = [(one, 0 if found is None else _confirmed_blocks(found, one.name)) for one in chosen]
        lacking = [(one, blocks) for one, blocks in confirmed if found is None or blocks < found.blocks]
        for endpoint, _ in lacking:
            stream = self._promisable(endpoint, cycle.now_s)
            if stream is not None:
                self._index.index.promise(stream, keys, self.lag.ttl_s)
                cycle.kept[self._promised] = keys[min([blocks for _, blocks in lacking]) :]
                if endpoint is computes:
                    self._watch(cycle, computes, stream, keys)

    def told(self, cycle: Cycle) -> dict[str, Sequence[int]]:
        """Return the keys that were promised, without those of which events say already that they are there."""
        return {PROMISED: cycle.kept[self._promised]} if self._promised in cycle.kept else {}

    def learn(self, kind: str, candidates: Sequence[Candidate], chain: Sequence[int], now_s: float) -> None:
        if kind != PROMISED or not self._speculates or self._index is None:
            return
        for candidate in candidates:
            stream = self._promisable(candidate.endpoint, now_s)
            if stream is not None:
                self._index.index.promise(stream, [BlockKey(key) for key in chain], self.lag.ttl_s)

    def pool_changed(self, endpoints: Sequence[Endpoint]) -> None:
        self._names.pool_changed(endpoints)
        self.lag.keep({stream for endpoint in endpoints for stream in self._names.of(endpoint)})

    def _matches(self, cycle: Cycle, scores: PromptScores, size: int) -> dict[EndpointName, PrefixMatch]:
        assert self._known is not None
        rows = {row.stream: row for row in scores.streams}
        found, silent, others = {}, [], []
        for candidate in cycle.candidates:
            name = candidate.endpoint.name
            streams = self._names.of(candidate.endpoint)
            row = _row(rows, streams)
            if row is not None:
                found[name] = _match(row, size, cycle.request.tokens_complete)
            elif (known := self._known.first(streams, cycle.now_s)) is None:
                silent.append(name)
            elif cycle.request.lora_name is None:
                others.append(name)
            else:  # keys depend on the adapter's name alone, so it says something that none of them is there
                found[name] = PrefixMatch(0, MatchSource.EVENTS, stale=known.stale)
        if silent:
            cycle.notes.append(f"{self.name}: no event has come from {_some(silent)}")
        if others:
            model = cycle.request.model
            cycle.notes.append(f"{self.name}: events of {_some(others)} name another model than {model!r} (setting models)")
        return found

    def _promisable(self, endpoint: Endpoint, now_s: float) -> Stream | None:
        """Return the stream to promise blocks to; None where they are promised only to those that were heard of."""
        assert self._known is not None
        known = self._known.first(self._names.of(endpoint), now_s)
        if known is not None:
            return known.stream
        return endpoint.stream if self._promise_unheard else None

    def _watch(self, cycle: Cycle, endpoint: Endpoint, stream: Stream, keys: Sequence[BlockKey]) -> None:
        """Wait for the last block that the engine will have to compute, if that was not promised before."""
        assert self._index is not None
        size = self._index.config.keys.block_size
        load = next(candidate.load for candidate in cycle.candidates if candidate.name == endpoint.name)
        engine_size = (load.report and load.report.block_size_tokens) or size
        last = len(keys) * size // engine_size * engine_size // size
        found = cycle.matches.get(self.name)
        held = 0 if found is None else found.of(endpoint.name).tokens
        if last * size > held:
            self.lag.watch(stream, keys[last - 1], cycle.now_s)

    def _holds(self, stream: Stream, key: BlockKey) -> bool:
        assert self._index is not None
        lookup = self._index.index.lookup([key], [stream.pod])
        return any(slot.stream == stream for slot in lookup.holders[0])


def _confirmed_blocks(found: PrefixMatches, endpoint: EndpointName) -> int:
    """Return how many of the prompt's blocks events say that an endpoint holds."""
    match = found.of(endpoint)
    if match.source is not MatchSource.EVENTS or match.stale is not None:
        return 0
    return (match.tokens - match.speculative_tokens) // found.block_size_tokens


def _query(request: RouteRequest) -> Query:
    assert request.token_ids is not None
    return Query(
        request.token_ids,
        request.model,
        lora_name=request.lora_name,
        cache_salt=request.cache_salt,
        multimodal=request.multimodal,
        scorer="longest-prefix",
    )


def _row(rows: Mapping[Stream, StreamScore], streams: Sequence[Stream]) -> StreamScore | None:
    """Return the first row of an endpoint's streams that events speak of, else one that rests on promises alone."""
    promised = None
    for stream in streams:
        row = rows.get(stream)
        if row is not None:
            if row.model is not None or row.matched_blocks > row.speculative:
                return row
            promised = promised or row
    return promised


_NOTHING = PrefixMatch(0, MatchSource.EVENTS, cached_tokens=0)


def _match(row: StreamScore, size: int, complete: bool) -> PrefixMatch:
    if not row.matched_tokens and row.stale is None:
        return _NOTHING
    worth = int(row.score * size)
    return PrefixMatch(
        row.matched_tokens,
        MatchSource.EVENTS,
        tiers={} if row.tiers.keys() <= {GPU} else {tier: blocks * size for tier, blocks in row.tiers.items()},
        speculative_tokens=row.speculative * size,
        stale=row.stale,
        cached_tokens=row.cached_tokens if complete else None,  # behind known tokens comes more: the last is no exception
        worth_tokens=None if worth == row.matched_tokens else worth,
    )


def _why(request: RouteRequest) -> str:
    return request.tokens_problem or "nobody asked for them"


def _some(names: Sequence[EndpointName]) -> str:
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return ", ".join(islice(names, _NAMED_MAX)) + more
