"""The index layer as one object: what an embedding scheduler, the service and the command line all use.

with Indexer(load_config("kvatlas.yaml")) as indexer:
    best = indexer.score(Query(token_ids, model="llama")).pods[0]
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Collection, Sequence

from kvatlas.config import Config, EngineSettings, check_keys
from kvatlas.index import Index, IndexLimits, make_index
from kvatlas.ingest.apply import Applier
from kvatlas.ingest.ingestor import Ingestor
from kvatlas.ingest.setup import engine_sources, limits_of, sources_of
from kvatlas.ingest.sources import Origin
from kvatlas.ingest.sources.zmq import ZmqCentralSource
from kvatlas.ingest.worker import StreamWorker
from kvatlas.keys import KeyRecipe, as_token_array, key_recipe
from kvatlas.observe.metrics import Metrics
from kvatlas.results import BlockLocality, Holder, PodScore, PodStatus, Query, ScoreResult
from kvatlas.score import Matcher, Prompt, Scorer, TierWeights, load_scorer
from kvatlas.types import (
    GPU,
    BlockKey,
    DpRank,
    Frame,
    GroupIdx,
    IndexStats,
    PodId,
    PromptScores,
    Stream,
    StreamInfo,
    StreamScore,
    Tier,
)

Matched = Callable[[str, Sequence[BlockKey], int, int], None]
"""Is told of a prompt that was matched: its model (no alias), its block keys, how many tokens it has, and how many of its
blocks the best stream holds. From the asker's thread."""


class Indexer:
    """Reads engines' KV events into an index and answers who holds the longest prefix of a prompt. Thread-safe."""

    def __init__(
        self,
        config: Config | None = None,
        *,
        metrics: Metrics | None = None,
        index: Index | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config or Config()
        settings = self.config
        self.schema = _key_recipe(settings)
        self.index: Index = index or make_index(self.schema, _index_limits(settings), clock, settings.index.core)
        self.metrics = metrics or Metrics(core=self.index.core)
        weights = TierWeights(
            {Tier(name): weight for name, weight in settings.tiered_cache.weights.items()},
            settings.tiered_cache.unknown_weight,
        )
        stale_weight = settings.ingest.stale_weight if settings.ingest.stale_entries == "downweight" else 1.0
        self._matcher = Matcher(self.index, self.schema, weights, stale_weight)
        self._scorers: dict[str, Scorer] = {settings.scorer: load_scorer(settings.scorer)}
        self._ingest = Ingestor(
            self.index,
            self.metrics,
            Applier(self.index, self.metrics, settings.models),
            sources_of(settings),
            limits_of(settings),
        )
        by_hash = settings.keys.mode == "engine"
        algorithm = settings.keys.engine.algorithm if by_hash else ""
        self._matched: Matched | None = None
        self.metrics.keys(settings.keys.mode, algorithm, settings.keys.block_size)
        self.metrics.observe_index(self.stats, self.pods)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the configured event sources in the background. SourceError if an address cannot be bound."""
        self._ingest.start()

    def close(self) -> None:
        """Stop the event sources."""
        self._ingest.close()

    def follow(self, engines: Sequence[EngineSettings]) -> None:
        """Read the events of these engines too, and of those given before only of these. Takes effect once started.

        What an engine that is left held is dropped as if it could not be reached: after ingest.goneAfter.
        """
        self._ingest.follow({key: source for one in engines for key, source in engine_sources(self.config, one).items()})

    def __enter__(self) -> Indexer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def ready(self) -> tuple[bool, str]:
        """Return whether answers can be relied on, and why not: before start, and while streams are still catching up."""
        if not self._ingest.running:
            return False, self._ingest.failure or "event sources are not started"
        catching_up = [str(worker.stream) for worker in self._ingest.workers() if not worker.caught_up]
        if catching_up:
            return False, f"{len(catching_up)} streams are catching up: {', '.join(sorted(catching_up)[:5])}"
        return True, "ok"

    # -- read path ----------------------------------------------------------------------------------------------------

    def block_keys(self, query: Query) -> list[BlockKey]:
        """Return the key of every whole index block of a prompt.

        TokensError for input that is no token ids. Where keys are the engines' hashes or llm-d's, RequestError for an adapter
        that is not in keys.engine.loras, and for a multimodal item without a length.
        """
        return self.schema.keys(
            as_token_array(query.token_ids),
            self._canonical(query.model),
            lora_name=query.lora_name,
            cache_salt=query.cache_salt,
            multimodal=query.multimodal,
        )

    def score(self, query: Query) -> ScoreResult:
        """Score every candidate for a prompt, best first: the pods that serve the model, and whoever holds something of it.

        Pods of another model are no candidates. TokensError for bad tokens, RequestError for an unknown scorer, and as
        :meth:`block_keys` does.
        """
        tokens = as_token_array(query.token_ids)
        found = self._match(query, tokens)
        by_pod: dict[PodId, list[StreamScore]] = {}
        for stream in found.streams:
            by_pod.setdefault(stream.stream.pod, []).append(stream)
        pods = sorted((_pod_score(ranks) for ranks in by_pod.values()), key=lambda pod: (-pod.score, pod.pod))
        return ScoreResult(
            pods=tuple(pods),
            scorer=query.scorer or self.config.scorer,
            prompt_tokens=len(tokens),
            blocks=found.blocks,
            cache_hits=found.blocks_held,
            coverage=found.blocks_held / found.blocks if found.blocks else 0.0,
        )

    def match(self, query: Query) -> PromptScores:
        """Return what each rank of each pod holds of a prompt, in no order. Raises as :meth:`score` does."""
        return self._match(query, as_token_array(query.token_ids))

    def candidates(self, query: Query, limit: int | None = None) -> tuple[PodScore, ...]:
        """Return the pods that hold something of a prompt, best first, at most ``limit``."""
        return tuple(pod for pod in self.score(query).pods if pod.score > 0)[:limit]

    def locality(self, keys: Sequence[BlockKey], pods: Collection[PodId] | None = None) -> tuple[BlockLocality, ...]:
        """Return where each block lies."""
        started_s = time.perf_counter()
        lookup = self.index.lookup(keys, pods)
        stale = {stream for stream, info in lookup.streams.items() if info.stale is not None}
        answer = []
        for key, slots, promised in zip(lookup.keys, lookup.holders, lookup.speculative, strict=True):
            holders = [
                Holder(slot.stream.pod, slot.stream.dp_rank, slot.tier, slot.group, copies, False, slot.stream in stale)
                for slot, copies in sorted(slots.items())
            ]
            holders += [
                Holder(stream.pod, stream.dp_rank, GPU, GroupIdx(0), 0, True, stream in stale) for stream in sorted(promised)
            ]
            answer.append(BlockLocality(key, tuple(holders)))
        held = sum(1 for block in answer if block.holders)
        self.metrics.query("locality", time.perf_counter() - started_s, len(keys), held)
        return tuple(answer)

    def promise(self, query: Query, stream: Stream, ttl_s: float | None = None) -> None:
        """Note that a request was sent to a pod's rank: its blocks count there until events confirm them or time is up."""
        ttl_s = self.config.index.speculative_ttl if ttl_s is None else ttl_s
        self.index.promise(stream, self.block_keys(query), ttl_s)

    def watch_matches(self, matched: Matched) -> None:
        """Tell somebody of every prompt that is matched. The last call counts."""
        self._matched = matched

    def _match(self, query: Query, tokens: array[int]) -> PromptScores:
        started_s = time.perf_counter()
        prompt = Prompt(tokens, self._canonical(query.model), query.lora_name, query.cache_salt, query.multimodal, query.pods)
        found = self._matcher.match(prompt, self._scorer(query.scorer))
        best_blocks = max([stream.matched_blocks for stream in found.streams], default=0)
        self.metrics.query("score", time.perf_counter() - started_s, found.blocks, best_blocks)
        if self._matched is not None:
            self._matched(prompt.model, found.keys, len(tokens), best_blocks)
        return found

    def _scorer(self, name: str | None) -> Scorer:
        name = name or self.config.scorer
        if name not in self._scorers:
            self._scorers[name] = load_scorer(name)
        return self._scorers[name]

    def _canonical(self, model: str) -> str:
        return self.config.models.get(model, model)

    # -- write path ---------------------------------------------------------------------------------------------------

    def publish(self, frame: Frame, *, decoder: str = "vllm", pod: PodId | None = None, model: str | None = None) -> None:
        """Take a frame from this process. RequestError when the stream's queue is full: nothing was taken, send it again."""
        self._ingest.publish(Origin("in-process", decoder=decoder, pod=pod, model=model), frame)

    def sync(self, timeout_s: float = 10.0) -> bool:
        """Bring the index up to what every engine has published by now, by asking them.

        False if one could not be asked (no replay endpoint, no answer). TimeoutError.
        """
        return self._ingest.sync(timeout_s)

    def drain(self, timeout_s: float = 10.0) -> None:
        """Return when every frame received so far is in the index."""
        self._ingest.drain(timeout_s)

    # -- state --------------------------------------------------------------------------------------------------------

    def stats(self) -> IndexStats:
        """Return the index's sizes."""
        return self.index.stats()

    def pods(self) -> tuple[PodStatus, ...]:
        """Return every stream (rank of a pod), by name, and the engines that were not heard of yet."""
        workers = {worker.stream: worker for worker in self._ingest.workers()}
        heard_of = {stream: StreamInfo(stream, None, {}, worker.stale, 0, 0, None) for stream, worker in workers.items()}
        known = [_status(info, workers.get(stream)) for stream, info in (heard_of | dict(self.index.streams())).items()]
        seen = {worker.source for worker in workers.values()}
        silent = [_silent(engine) for engine in self.config.zmq.engines if engine.endpoint not in seen]
        return tuple(sorted([*known, *silent], key=lambda status: (status.pod, status.dp_rank)))

    @property
    def event_endpoint(self) -> str | None:
        """The address that engines can connect to, when one is bound."""
        for source in self._ingest.sources:
            if isinstance(source, ZmqCentralSource) and source.bound_endpoint:
                return source.bound_endpoint
        return None


def _pod_score(ranks: Sequence[StreamScore]) -> PodScore:
    """Return what a pod's best rank holds, with what each of them would serve."""
    best = max(ranks, key=lambda rank: (rank.score, rank.cached_tokens, -rank.stream.dp_rank))
    return PodScore(
        pod=best.stream.pod,
        model=best.model,
        score=best.score,
        matched_blocks=best.matched_blocks,
        matched_tokens=best.matched_tokens,
        predicted_cached_tokens=best.cached_tokens,
        tiers=best.tiers,
        dp_rank=best.stream.dp_rank,
        predicted_by_rank={
            rank.stream.dp_rank: rank.cached_tokens for rank in sorted(ranks, key=lambda rank: rank.stream.dp_rank)
        },
        speculative_blocks=best.speculative,
        stale=best.stale is not None,
        stale_reason=best.stale,
    )


def _status(info: StreamInfo, worker: StreamWorker | None) -> PodStatus:
    sizes = {spec.block_size_tokens for spec in info.groups.values() if spec.block_size_tokens is not None}
    return PodStatus(
        pod=info.stream.pod,
        dp_rank=info.stream.dp_rank,
        model=info.model or (worker.model if worker else None),
        state="fresh" if info.stale is None else "stale",
        stale_reason=info.stale,
        blocks=info.blocks,
        orphans=info.orphans,
        block_sizes_tokens=tuple(sorted(sizes)),
        groups={index: spec.kind.value for index, spec in sorted(info.groups.items())},
        next_seq=worker.next_seq if worker else None,
        queue_depth=worker.queue_depth if worker else 0,
        gaps=worker.gaps if worker else 0,
        replays=worker.replays if worker else 0,
        replay_answers=worker.replay_answers if worker else None,
        restarts=worker.restarts if worker else 0,
        last_event_age_s=None if info.last_event_s is None else max(0.0, time.time() - info.last_event_s),
        source=worker.source if worker else "in-process",
        tiers=worker.tiers if worker else (),
        replay_problem=worker.replay_problem if worker else None,
    )


def _silent(engine: EngineSettings) -> PodStatus:
    """Return the status of a configured engine that no event came from yet."""
    return PodStatus(
        pod=PodId(engine.pod or engine.endpoint),
        dp_rank=DpRank(0),
        model=engine.model,
        state="connecting",
        stale_reason=None,
        blocks=0,
        orphans=0,
        block_sizes_tokens=(),
        groups={},
        next_seq=None,
        queue_depth=0,
        gaps=0,
        replays=0,
        replay_answers=None,
        restarts=0,
        last_event_age_s=None,
        source=engine.endpoint,
    )


def _key_recipe(config: Config) -> KeyRecipe:
    keys = config.keys
    check_keys(keys)
    engine = keys.engine
    return key_recipe(keys.mode, keys.block_size, keys.seed, engine.algorithm, engine.seed, engine.loras)


def _index_limits(config: Config) -> IndexLimits:
    settings = config.index
    return IndexLimits(
        ttl_s=settings.ttl,
        blocks_max=settings.max_size,
        bytes_max=settings.max_bytes,
        orphans_max=settings.orphans_max,
        retired_max=settings.retired_hashes_max,
    )
