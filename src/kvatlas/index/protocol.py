"""What an index does, whatever it is built of. Every implementation passes ``tests/contract``."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from kvatlas.types import (
    ApplyReport,
    BlockKey,
    DpRank,
    EventBatch,
    Extra,
    IndexStats,
    Lookup,
    PodId,
    PromptScores,
    StaleReason,
    Stream,
    StreamInfo,
    Tier,
)

PLACES_MAX = 1000
"""Places (tier and attention group) that a stream's copies are told apart in. A real engine has a handful."""


class IndexLimits(msgspec.Struct, frozen=True):
    """How far an index may grow. What is reached evicts: the least recently stored or asked block goes first."""

    ttl_s: float = 3600.0
    blocks_max: int = 1_000_000
    """Distinct block keys with a holder."""
    bytes_max: int = 2 << 30
    orphans_max: int = 65_536
    """Per stream: blocks known by engine hash only. The oldest is given up, and counted."""
    retired_max: int = 65_536
    """Per stream: blocks no longer held whose tokens are remembered, for children and lower tiers that name them late.

    They are kept in two generations: when half of this has retired since the last time, what had retired before is forgotten.
    So at least the last ``retired_max / 2`` are remembered. A single event that retires more than ``retired_max`` is not.
    """
    promises_max: int = 262_144
    """Speculative entries. The one that ends first is given up."""


class Index(Protocol):
    """A map block key -> slots, fed by ordered events of each stream. All methods may be called from any thread.

    A *stream* is one KV cache (a data-parallel rank of a pod). Copies are counted per slot: an engine announces a block once a
    copy and removes it once a copy. Time is the clock given at construction, in seconds.
    """

    @property
    def core(self) -> str:
        """Which implementation this is: ``reference``, ``native``, ..."""
        ...

    def apply(self, stream: Stream, batch: EventBatch) -> ApplyReport:
        """Apply one batch of a stream's events, in order.

        Blocks whose parent or tokens are unknown are kept by engine hash (orphans) and get their keys when a later event
        names them. A removal of an unknown block is counted and changes nothing.

        Where keys are engine hashes there are no orphans: any block is held under its hash. Blocks of another size than the
        index's are refused, and counted.
        """
        ...

    def lookup(self, keys: Sequence[BlockKey], pods: Collection[PodId] | None = None) -> Lookup:
        """Return who holds each key, for all pods or the named ones. Keys found count as used (TTL and eviction order).

        A stream that was promised one of the blocks is listed even if nothing was heard of it yet.
        """
        ...

    def promise(self, stream: Stream, keys: Sequence[BlockKey], ttl_s: float) -> None:
        """Note that a stream will soon hold ``keys`` (a request was sent there). Ends by event or after ``ttl_s``."""
        ...

    def mark(self, stream: Stream, stale: StaleReason | None) -> None:
        """Say that a stream's entries may be wrong, and why; or (None) that they are right again."""
        ...

    def drop(self, stream: Stream) -> int:
        """Drop all that a stream holds, costing only its own entries; the stream stays known. Returns entries dropped."""
        ...

    def forget(self, stream: Stream) -> int:
        """Drop a stream and all trace of it. Returns entries dropped."""
        ...

    def expire(self) -> int:
        """Evict blocks older than the TTL and promises that ended. Returns blocks evicted. Cheap when there are none."""
        ...

    def streams(self) -> Mapping[Stream, StreamInfo]:
        """Return what is known of each stream."""
        ...

    def stats(self) -> IndexStats:
        """Return the index's sizes."""
        ...


class RankApplied(msgspec.Struct, frozen=True):
    """What payloads did to one rank that they named."""

    dp_rank: DpRank
    report: ApplyReport
    stored_events: int
    removed_events: int
    cleared_events: int
    timestamp_s: float | None
    """Of the last payload that has one, unix seconds."""
    tiers: frozenset[Tier]
    """Tiers that blocks were stored to."""


class AppliedPayloads(msgspec.Struct, frozen=True):
    """The first ``taken`` payloads were applied. The next one, if there is one, is for its Python decoder to judge."""

    taken: int
    ranks: tuple[RankApplied, ...]

    @property
    def report(self) -> ApplyReport:
        """What was done to all ranks."""
        total = ApplyReport()
        for rank in self.ranks:
            total.add(rank.report)
        return total


@runtime_checkable
class PayloadIndex(Protocol):
    """An index that reads payloads by itself."""

    def apply_payloads(
        self, stream: Stream, payloads: Sequence[bytes], decoder: str = "vllm", model: str | None = None
    ) -> AppliedPayloads:
        """Decode and apply payloads in order, up to the first that is damaged or odd.

        ``decoder``: a name that a :class:`~kvatlas.ingest.decode.Decoder` has as its ``wire``. A payload that names a rank
        speaks for that rank of the pod.
        """
        ...


class Weighing(msgspec.Struct, frozen=True):
    """How to score: a built-in scorer by name, what tiers are worth, and a factor on what a stale stream holds."""

    scorer: str = "longest-prefix"
    by_tier: Mapping[Tier, float] = msgspec.field(default_factory=lambda: {Tier("gpu"): 1.0})
    unknown: float = 0.1
    stale_weight: float = 1.0


@runtime_checkable
class FusedIndex(Protocol):
    """An index that scores prompts by itself: tokens in, scores out; or keys in, where keys are not our own."""

    def score_prompt(
        self,
        tokens: array[int],
        root: int,
        extras: Sequence[Extra],
        model: str,
        pods: Collection[PodId] | None,
        weighing: Weighing,
    ) -> PromptScores:
        """Score a prompt whose chain begins at ``root``. Candidates: streams of ``model``, and who holds something of it."""
        ...

    def score_keys(
        self,
        keys: Sequence[BlockKey],
        prompt_tokens: int,
        model: str,
        pods: Collection[PodId] | None,
        weighing: Weighing,
        *,
        confined: bool = False,
    ) -> PromptScores:
        """Score a prompt by its keys. ``confined``: a stream of another model is no candidate, whatever it holds."""
        ...
