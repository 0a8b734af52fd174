"""The native index: the reference's answers, from Rust. What it keeps and how is told in ``native/core``.

Here values are only carried over: Python's on one side, plain tuples and buffers on the other. All calls release the GIL.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias, cast

from kvatlas import _native
from kvatlas.errors import SnapshotError
from kvatlas.index.protocol import AppliedPayloads, IndexLimits, RankApplied, Weighing
from kvatlas.keys import KeyRecipe, KeySchema, TokenIds, as_token_array, prompt_extras
from kvatlas.types import (
    AllBlocksCleared,
    ApplyReport,
    AttentionKind,
    BlockKey,
    BlockRemoved,
    BlockStored,
    DpRank,
    Event,
    EventBatch,
    Extra,
    GroupIdx,
    GroupSpec,
    IndexStats,
    Lookup,
    MultimodalItem,
    PodId,
    PromptScores,
    Slot,
    StaleReason,
    Stream,
    StreamInfo,
    StreamScore,
    Tier,
)

BlockKeys: TypeAlias = "Sequence[BlockKey] | array[int]"
"""Block keys: a sequence, or (fastest) an array('Q')."""

_REASONS = list(StaleReason)  # by code; codes are in snapshots, so new reasons go to the end
_CODES = {reason: code for code, reason in enumerate(_REASONS)}


class NativeIndex:
    """An in-memory :class:`~kvatlas.index.protocol.Index` in Rust."""

    def __init__(
        self,
        schema: KeyRecipe | None = None,
        limits: IndexLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.schema: KeyRecipe = schema or KeySchema()
        self.limits = limits or IndexLimits()
        self._clock = clock
        self._core = _native.Core(
            self.schema.block_size_tokens,
            self.schema.seed,
            self.schema.mode,
            ttl_s=self.limits.ttl_s,
            blocks_max=self.limits.blocks_max,
            bytes_max=self.limits.bytes_max,
            orphans_max=self.limits.orphans_max,
            retired_max=self.limits.retired_max,
            promises_max=self.limits.promises_max,
        )

    @property
    def core(self) -> str:
        return "native"

    # -- write path -------------------------------------------------------------------------------------------------

    def apply_payloads(
        self, stream: Stream, payloads: Sequence[bytes], decoder: str = "vllm", model: str | None = None
    ) -> AppliedPayloads:
        taken, ranks = self._core.apply_payloads(stream.pod, stream.dp_rank, payloads, decoder, model or None, self._clock())
        applied = [
            RankApplied(
                DpRank(dp_rank),
                ApplyReport(*report),
                stored,
                removed,
                cleared,
                timestamp_s,
                frozenset(cast("list[Tier]", tiers)),
            )
            for dp_rank, report, stored, removed, cleared, timestamp_s, tiers in ranks
        ]
        return AppliedPayloads(taken, tuple(applied))

    def apply(self, stream: Stream, batch: EventBatch) -> ApplyReport:
        events = [_event_tuple(event) for event in batch.events]
        report = self._core.apply(stream.pod, stream.dp_rank, events, batch.model or None, batch.timestamp_s, self._clock())
        return ApplyReport(*report)

    def promise(self, stream: Stream, keys: BlockKeys, ttl_s: float) -> None:
        self._core.promise(stream.pod, stream.dp_rank, keys, self._clock() + ttl_s)

    def mark(self, stream: Stream, stale: StaleReason | None) -> None:
        self._core.mark(stream.pod, stream.dp_rank, None if stale is None else _CODES[stale])

    def drop(self, stream: Stream) -> int:
        return self._core.drop(stream.pod, stream.dp_rank, False)

    def forget(self, stream: Stream) -> int:
        return self._core.drop(stream.pod, stream.dp_rank, True)

    def expire(self) -> int:
        return self._core.expire(self._clock())

    # -- read path --------------------------------------------------------------------------------------------------

    def lookup(self, keys: BlockKeys, pods: Collection[PodId] | None = None) -> Lookup:
        wanted = None if pods is None else list(map(_text, pods))
        runs, sets, promises, infos = self._core.lookup(keys, wanted, self._clock())
        slots = [
            {
                Slot(Stream(PodId(pod), DpRank(rank)), Tier(tier), GroupIdx(group)): copies
                for pod, rank, tier, group, copies in holders
            }
            for holders in sets
        ]
        nobody: dict[Slot, int] = {}
        held = [nobody] * len(keys)
        for start, end, number in runs:
            held[start:end] = [slots[number]] * (end - start)
        promised: list[set[Stream]] = [set() for _ in keys]
        streams = {info.stream: info for info in map(_stream_info, infos)}
        for position, (pod, rank) in promises:
            stream = Stream(PodId(pod), DpRank(rank))
            promised[position].add(stream)
            streams.setdefault(stream, StreamInfo(stream, None, {}, None, 0, 0, None))
        return Lookup(cast(Sequence[BlockKey], keys), held, promised, streams)

    def score(
        self,
        tokens: TokenIds,
        model: str,
        *,
        lora_name: str | None = None,
        cache_salt: str | None = None,
        multimodal: Sequence[MultimodalItem] = (),
        pods: Collection[PodId] | None = None,
        weighing: Weighing | None = None,
    ) -> _native.Scores:
        """Hash a prompt, walk its blocks, score every candidate: one call. Fastest from an array('I') or uint32 buffer."""
        question = _question(weighing or Weighing(), pods, model)
        if not isinstance(self.schema, KeySchema):
            array = as_token_array(tokens)
            keys = self.schema.keys(array, model, lora_name=lora_name, cache_salt=cache_salt, multimodal=multimodal)
            confined = self.schema.confines(model, lora_name)
            return self._core.score_keys(keys, len(array), question, self._clock(), confined)
        extras = _extra_tuples(prompt_extras(cache_salt, multimodal))
        root = self.schema.root(lora_name or model).key
        if not isinstance(tokens, list):
            tokens = as_token_array(tokens)
        try:
            return self._core.score_tokens(tokens, root, extras, question, self._clock())
        except (TypeError, OverflowError):
            return self._core.score_tokens(as_token_array(tokens), root, extras, question, self._clock())

    def score_prompt(
        self,
        tokens: array[int],
        root: int,
        extras: Sequence[Extra],
        model: str,
        pods: Collection[PodId] | None,
        weighing: Weighing,
    ) -> PromptScores:
        question = _question(weighing, pods, model)
        scores = self._core.score_tokens(tokens, root, _extra_tuples(extras), question, self._clock())
        return _prompt_scores(scores)

    def score_keys(
        self,
        keys: BlockKeys,
        prompt_tokens: int,
        model: str,
        pods: Collection[PodId] | None,
        weighing: Weighing,
        *,
        confined: bool = False,
    ) -> PromptScores:
        scores = self.find(keys, prompt_tokens=prompt_tokens, pods=pods, model=model, weighing=weighing, confined=confined)
        return _prompt_scores(scores)

    def find(
        self,
        keys: BlockKeys,
        *,
        prompt_tokens: int | None = None,
        pods: Collection[PodId] | None = None,
        model: str | None = None,
        weighing: Weighing | None = None,
        confined: bool = False,
    ) -> _native.Scores:
        """Score every candidate for a prompt's keys. ``prompt_tokens``: by default as many as the keys cover."""
        if prompt_tokens is None:
            prompt_tokens = len(keys) * self.schema.block_size_tokens
        question = _question(weighing or Weighing(), pods, model)
        return self._core.score_keys(keys, prompt_tokens, question, self._clock(), confined)

    def score_many(
        self,
        prompts: Sequence[TokenIds],
        model: str,
        *,
        pods: Collection[PodId] | None = None,
        weighing: Weighing | None = None,
    ) -> list[_native.Scores]:
        """Score many prompts of one model in one call."""
        if not isinstance(self.schema, KeySchema):
            return [self.score(tokens, model, pods=pods, weighing=weighing) for tokens in prompts]
        root = self.schema.root(model).key
        asked: list[tuple[array[int], int, list[_native._Extra]]] = [(as_token_array(tokens), root, []) for tokens in prompts]
        return self._core.score_prompts(asked, _question(weighing or Weighing(), pods, model), self._clock())

    # -- snapshots --------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """Return the whole index but its promises (``docs/snapshots.md``). Events wait meanwhile, queries do not."""
        return self._core.snapshot(self._clock())

    def restore(self, snapshot: bytes) -> None:
        """Become what the index of a snapshot was, if no stream is known here yet. Queries go on, and see it at the end.

        Raises SnapshotError and stays as it is if the snapshot is damaged, or made with another schema, or not needed.
        """
        try:
            self._core.restore(snapshot, len(_REASONS), self._clock())
        except ValueError as error:
            raise SnapshotError(*error.args) from None

    # -- state ------------------------------------------------------------------------------------------------------

    def streams(self) -> Mapping[Stream, StreamInfo]:
        return {info.stream: info for info in map(_stream_info, self._core.streams())}

    def stats(self) -> IndexStats:
        return IndexStats(*self._core.stats())


def _question(weighing: Weighing, pods: Collection[PodId] | None, model: str | None) -> _native._Question:
    weights: list[tuple[str, float]] = list(weighing.by_tier.items())
    return (
        None if pods is None else list(map(_text, pods)),
        None if model is None else _text(model),
        weighing.scorer,
        weights,
        weighing.unknown,
        weighing.stale_weight,
    )


def _text(name: str) -> str:
    """Return a name that UTF-8 can hold: a lone surrogate (JSON can bring one) is escaped, and so no stream's name."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def _extra_tuples(extras: Sequence[Extra]) -> list[_native._Extra]:
    return [(extra.offset_tokens, extra.kind, extra.value) for extra in extras]


def _event_tuple(event: Event) -> _native._Event:
    if isinstance(event, BlockStored):
        spec = event.spec
        return (
            event.hashes,
            event.parent,
            event.token_ids,
            event.block_size_tokens,
            event.tier,
            event.group,
            None if spec is None else (spec.kind.value, spec.window_tokens, spec.block_size_tokens),
            event.lora_name,
            None if event.extras is None else list(map(_extra_tuples, event.extras)),
        )
    if isinstance(event, BlockRemoved):
        return (event.hashes, event.tier, event.group)
    assert isinstance(event, AllBlocksCleared)
    return (event.tier,)


def _prompt_scores(scores: _native.Scores) -> PromptScores:
    streams = [
        StreamScore(
            Stream(pod, rank),
            model,
            score,
            matched_blocks,
            matched_tokens,
            cached_tokens,
            dict(tiers),
            speculative,
            None if stale is None else _REASONS[stale],
        )
        for pod, rank, model, score, matched_blocks, matched_tokens, cached_tokens, tiers, speculative, stale in scores.rows()
    ]
    return PromptScores(streams, cast(Sequence[BlockKey], array("Q", scores.keys())), scores.blocks_held)


def _stream_info(info: _native._Info) -> StreamInfo:
    (pod, rank), model, groups, stale, blocks, orphans, last_event_s = info
    return StreamInfo(
        stream=Stream(PodId(pod), DpRank(rank)),
        model=model,
        groups={GroupIdx(index): GroupSpec(AttentionKind(kind), window, size) for index, (kind, window, size) in groups},
        stale=None if stale is None else _REASONS[stale],
        blocks=blocks,
        orphans=orphans,
        last_event_s=last_event_s,
    )
