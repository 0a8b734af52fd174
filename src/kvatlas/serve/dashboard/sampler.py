"""Looks at the service every two seconds, for all who look at the page; where nobody does every ten, to know since when.

What is looked at costs what there are streams and endpoints, never what there are blocks. It runs in a thread; the event loop
only copies what must not change meanwhile.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import msgspec

from kvatlas.index.choice import why_no_native
from kvatlas.indexer import Indexer
from kvatlas.observe.logs import get_logger
from kvatlas.results import PodStatus
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.log import Logged
from kvatlas.route.prefix.streams import StreamNames
from kvatlas.route.router import Router
from kvatlas.serve.dashboard.history import STEP_S, WINDOW_S, History, HistoryShown, Increase, quantile
from kvatlas.serve.dashboard.prefixes import HotPrefixes, Prefix
from kvatlas.serve.dashboard.problems import SinceWhen, problems_of
from kvatlas.serve.dashboard.rows import RouterView, rows_of, totals_of
from kvatlas.serve.dashboard.state import (
    EngineRow,
    Facts,
    FleetShown,
    HolderShown,
    Limits,
    PrefixShown,
    Recent,
    ServiceShown,
)
from kvatlas.serve.dashboard.tally import Tally, Totals
from kvatlas.serve.queries import key_text
from kvatlas.serve.routing.explain import shown
from kvatlas.serve.workers.worker import Worker
from kvatlas.types import BlockKey, IndexStats

VIEWER_S = 15.0
"""Who asked longer ago looks no more."""
IDLE_STEPS = 5
DECISIONS_SHOWN = 12
CANDIDATES_SHOWN = 5
PREFIXES_SHOWN = 24
HOLDERS_SHOWN = 6
TTFTS_KEPT = 50
"""Of each step, for what is told of the last five minutes."""
PAUSE_S = 0.0005
"""Between the parts of a look, each of which takes up to 3 ms with 500 engines."""
LOOKUPS_MAX = 8
"""Prefixes whose holders are asked for at one look; with 500 holders each, that takes a few milliseconds."""

_log = get_logger(__name__)


class Sample(msgspec.Struct, frozen=True):
    """One look."""

    number: int
    fleet: FleetShown
    encoded: bytes
    """``fleet`` as JSON."""
    rows: tuple[EngineRow, ...]


class Sampler:
    """Keeps the last sample and the history. Of one event loop."""

    def __init__(
        self,
        indexer: Indexer,
        router: Router | None = None,
        health: Callable[[EndpointName], str] = lambda _name: "healthy",
        worker: Worker | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """``health``: an endpoint's state; ``worker``: which of several processes this is; ``clock``: the router's."""
        self._indexer = indexer
        self._router = router
        self._health = health
        self._clock = clock
        self._wall = wall
        self._prefixes = HotPrefixes()
        self._holders = Holders(indexer)
        self.tally = Tally(indexer.config.keys.block_size, self._prefixes, routed=router is not None)
        indexer.watch_matches(self.tally.matched)
        if router is not None:
            router.watch(self.tally)
        self._service = _service(indexer, worker, routed=router is not None)
        self._limits = Limits(indexer.config.index.max_size, indexer.config.index.max_bytes, indexer.config.ingest.queue_frames)
        self._pool: list[Endpoint] = []
        self._names = StreamNames()
        self._history = History()
        self._before = Totals()
        self._increase = Increase()
        self._since = SinceWhen()
        self._ttfts_s: deque[list[float]] = deque(maxlen=round(WINDOW_S / STEP_S))
        self._folded_s = self._asked_s = clock() - VIEWER_S
        self._looking = asyncio.Lock()
        self._sample: Sample | None = None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self._step()
            if self._watched or self._history.count % IDLE_STEPS == 1:
                try:
                    await self._look()
                except Exception as error:  # the page stands still, and says so; the service has other things to do
                    _log.warning("the dashboard has no new data", error=f"{type(error).__name__}: {error}"[:300])
            await asyncio.sleep(STEP_S)

    async def sample(self) -> Sample:
        """Return the last look; a new one where nobody looked of late."""
        watched, self._asked_s = self._watched, self._clock()
        if self._sample is None or not watched:
            await self._look()
        assert self._sample is not None
        return self._sample

    def history(self, first: int) -> HistoryShown:
        """Return the steps from number ``first`` on."""
        return self._history.since(first)

    @property
    def _watched(self) -> bool:
        return self._clock() - self._asked_s < VIEWER_S

    def _step(self) -> None:
        """Add a step to the history: some numbers, whatever the fleet's size."""
        totals, before = self.tally.totals(), self._before
        self._before = totals
        ttfts_s = self.tally.take_ttfts_s()
        self._ttfts_s.append(ttfts_s[-TTFTS_KEPT:])
        self._history.add(
            {
                "requests": totals.requests - before.requests,
                "prompt_tokens": totals.prompt_tokens - before.prompt_tokens,
                "saved_tokens": totals.saved_tokens - before.saved_tokens,
                "ttft_p50_s": quantile(ttfts_s, 0.5),
                "ttft_p90_s": quantile(ttfts_s, 0.9),
            }
        )

    async def _look(self) -> None:
        """Take a sample; one at a time."""
        number = self._history.count
        async with self._looking:
            if self._sample is not None and self._sample.number >= number:
                return
            logged = [] if self._router is None else self._router.log.last(DECISIONS_SHOWN)
            self._sample = await asyncio.to_thread(self._collect, number, logged)

    def _collect(self, number: int, logged: Sequence[Logged]) -> Sample:
        now_s, indexer = self._clock(), self._indexer
        pods, stats = indexer.pods(), indexer.stats()
        _let_others()
        rows = rows_of(pods, indexer.metrics.lags_s(), self._router_view(now_s))
        _let_others()
        self._prefixes.fold(now_s - self._folded_s)
        self._folded_s = now_s
        grown = self._increase.look(now_s, self._counters(pods, stats))
        ready, reason = indexer.ready()
        heard = any(row.source for row in rows)
        facts = Facts(
            service=msgspec.structs.replace(self._service, engines_named=self._service.engines_named or heard),
            ready=ready,
            not_ready_reason=reason,
            rows=rows,
            index=stats,
            limits=self._limits,
            grown=grown,
        )
        _let_others()
        prefixes = self._holders.shown(self._prefixes.top(PREFIXES_SHOWN))
        decisions = []
        for one in logged:
            _let_others()
            decisions.append(shown(one, CANDIDATES_SHOWN))
        fleet = FleetShown(
            at_s=round(self._wall(), 3),
            service=self._service,
            ready=ready,
            totals=totals_of(rows),
            index=stats,
            limits=self._limits,
            recent=self._recent(grown),
            problems=self._since.dated(problems_of(facts), self._wall()),
            prefixes=prefixes,
            prompts_matched=self.tally.prompts_matched,
            decisions=tuple(decisions),
        )
        return Sample(number, fleet, msgspec.json.encode(fleet), rows)

    def _router_view(self, now_s: float) -> RouterView | None:
        if self._router is None:
            return None
        candidates = self._router.candidates()
        pool = [one.endpoint for one in candidates]
        if pool != self._pool:
            self._pool = pool
            self._names.pool_changed(pool)
        sent = self.tally.sent()
        self.tally.forget(list(sent.keys() - {one.name for one in candidates}))
        return RouterView(candidates, self._health, sent, self._names, now_s)

    def _counters(self, pods: Sequence[PodStatus], stats: IndexStats) -> Mapping[str, float]:
        """Return what problems are told from by how it grows."""
        totals = msgspec.structs.asdict(self.tally.totals())
        return {
            **totals,
            "gaps": sum(pod.gaps for pod in pods),
            "evicted.size": stats.evicted_size,
            "evicted.bytes": stats.evicted_bytes,
            **{f"fault.{reason}": count for reason, count in self._indexer.metrics.faults().items()},
            **{f"untold.{reason}": count for reason, count in self.tally.without_tokens().items()},
        }

    def _recent(self, grown: Mapping[str, float]) -> Recent:
        ttfts_s = [ttft_s for step in list(self._ttfts_s) for ttft_s in step]
        return Recent(
            seconds=round(self._increase.seconds, 1),
            requests=grown["requests"],
            prompt_tokens=grown["prompt_tokens"],
            saved_tokens=grown["saved_tokens"],
            saved_told=grown["told"] > 0,
            ttft_p50_s=round(quantile(ttfts_s, 0.5), 4) if ttfts_s else None,
            ttft_p90_s=round(quantile(ttfts_s, 0.9), 4) if ttfts_s else None,
        )


class Holders:
    """Who holds the prefixes that are shown: asked for a few at a time, the others are as they were."""

    def __init__(self, indexer: Indexer) -> None:
        self._index = indexer.index
        self._block_size_tokens = indexer.config.keys.block_size
        self._known: dict[BlockKey, tuple[tuple[HolderShown, ...], int]] = {}
        """By block key, who was asked for longest ago first: some of its holders, and how many there are."""

    def shown(self, prefixes: Sequence[Prefix]) -> tuple[PrefixShown, ...]:
        """Return prefixes with their holders."""
        keys = [prefix.key for prefix in prefixes]
        wanted = set(keys)
        kept = {key: known for key, known in self._known.items() if key in wanted}
        new = [key for key in keys if key not in kept]
        due: list[BlockKey] = [*new, *kept][:LOOKUPS_MAX]
        lookup = self._index.lookup(due)
        stale = {stream for stream, info in lookup.streams.items() if info.stale is not None}
        for key, slots in zip(due, lookup.holders, strict=True):
            kept.pop(key, None)
            some = (HolderShown(str(slot.stream), slot.tier, slot.stream in stale) for slot in islice(slots, HOLDERS_SHOWN))
            kept[key] = tuple(some), len({slot.stream for slot in slots})
        self._known = kept
        return tuple(self._shown(prefix) for prefix in prefixes)

    def _shown(self, prefix: Prefix) -> PrefixShown:
        size = self._block_size_tokens
        holders, count = self._known.get(prefix.key, ((), 0))
        return PrefixShown(
            id=prefix.id,
            parent=prefix.parent,
            model=prefix.model,
            key=key_text(prefix.key),
            start_tokens=prefix.start_blocks * size,
            end_tokens=prefix.end_blocks * size,
            requests=prefix.requests,
            saved_tokens=round(prefix.held_blocks * size),
            holders=holders,
            holders_count=count,
        )


def _let_others() -> None:
    """Let a request's thread run, which would have to wait for the interpreter's lock (5 ms) else."""
    time.sleep(PAUSE_S)


def _service(indexer: Indexer, worker: Worker | None, *, routed: bool) -> ServiceShown:
    config, core = indexer.config, indexer.index.core
    return ServiceShown(
        version=importlib.metadata.version("kvatlas"),
        core=core,
        core_problem=why_no_native() if config.index.core == "auto" and core != "native" else None,
        keys_mode=config.keys.mode,
        block_size_tokens=config.keys.block_size,
        routed=routed,
        engines_named=bool(config.zmq.engines),
        worker=None if worker is None else str(worker),
        worker_starts=1 if worker is None else worker.starts,
        api_ports=() if worker is None else worker.api_ports,
    )
