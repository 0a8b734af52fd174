"""The vocabulary: what both paths speak. Imports nothing of ours."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Mapping, Sequence, Set
from typing import NewType

import msgspec

BlockKey = NewType("BlockKey", int)
"""Ours: 64 bits chained from model, tokens and extra keys; comparable across pods."""

EngineHash = NewType("EngineHash", int)
"""The engine's name for a block, as 64 bits: opaque, and all that a removal carries."""

PodId = NewType("PodId", str)
"""One engine deployment (one HTTP endpoint); it may run several data-parallel ranks."""

DpRank = NewType("DpRank", int)
"""Data-parallel rank inside a pod. Each rank has a KV cache of its own."""

GroupIdx = NewType("GroupIdx", int)
"""Index of an attention (KV cache) group inside a model; 0 where the model has one."""

Tier = NewType("Tier", str)
"""Where a copy lies: the engine's medium in lower case, so unknown media stay what they are."""

GPU = Tier("gpu")
CPU = Tier("cpu")
DISK = Tier("disk")
STORAGE = Tier("storage")


class Stream(msgspec.Struct, frozen=True, order=True, cache_hash=True, gc=False):
    """One ordered stream of events: one rank of one pod, and so one KV cache."""

    pod: PodId
    dp_rank: DpRank = DpRank(0)

    def __str__(self) -> str:
        return self.pod if self.dp_rank == 0 else f"{self.pod}#dp{self.dp_rank}"


class Slot(msgspec.Struct, frozen=True, order=True, cache_hash=True, gc=False):
    """The coordinates of a copy: which cache, which tier, which attention group."""

    stream: Stream
    tier: Tier = GPU
    group: GroupIdx = GroupIdx(0)


class AttentionKind(enum.Enum):
    """What a hit needs from an attention group.

    ``FULL``: every block from 0 on. ``SLIDING_WINDOW``: the last ``window_tokens - 1`` tokens. ``STATE``: the one block
    that ends at the hit (recurrent state). ``IGNORED``: nothing (encoder-only and cross attention are not prefix-cached).
    """

    FULL = "full"
    SLIDING_WINDOW = "sliding_window"
    STATE = "state"
    IGNORED = "ignored"


class GroupSpec(msgspec.Struct, frozen=True):
    """How one attention group of a model caches, as its engine announced it."""

    kind: AttentionKind = AttentionKind.FULL
    window_tokens: int | None = None
    block_size_tokens: int | None = None


class MultimodalItem(msgspec.Struct, frozen=True):
    """One image, audio or video in a prompt: its content hash and the prompt position of its first placeholder token."""

    hash: str
    offset_tokens: int
    length_tokens: int | None = None
    """Its placeholder tokens. Keys of the engine's kind need it (keys.mode); ours depend on where an item starts alone."""


class Extra(msgspec.Struct, frozen=True, order=True, gc=False):
    """What a block's key depends on beyond its tokens, at ``offset_tokens`` from the block's start.

    ``kind``: ``mm`` (an item that starts here), ``salt`` (cache_salt, block 0 only) or ``opaque`` (anything else an engine
    put into its hash, kept so that two different blocks never share a key).
    """

    offset_tokens: int
    kind: str
    value: bytes


class BlockStored(msgspec.Struct, frozen=True):
    """Copies of blocks were added.

    ``token_ids`` covers ``len(token_ids) / block_size_tokens`` blocks that follow ``parent``. ``hashes`` names all of them,
    or fewer: sliding-window groups list only what they keep. ``token_ids`` is empty in an offload placeholder event, which
    names blocks already known by hash. ``extras`` has one tuple a hash (not a block), or is None. Source: vLLM 0.32
    ``BlockStored``.
    """

    hashes: tuple[EngineHash, ...]
    parent: EngineHash | None = None
    token_ids: array[int] = msgspec.field(default_factory=lambda: array("I"))
    block_size_tokens: int | None = None
    tier: Tier = GPU
    group: GroupIdx = GroupIdx(0)
    spec: GroupSpec | None = None
    lora_name: str | None = None
    extras: tuple[tuple[Extra, ...], ...] | None = None
    session_id: str | None = None
    locality: str | None = None
    ownership: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True):
    """One copy of each block was removed. ``group`` None means every group (engines that do not tell groups apart)."""

    hashes: tuple[EngineHash, ...]
    tier: Tier = GPU
    group: GroupIdx | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True):
    """A tier was emptied. ``tier`` None means the device only: vLLM's lower tiers keep their blocks through a reset."""

    tier: Tier | None = None


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True):
    """What one payload says about one pod, in order. ``timestamp_s``: the engine's clock, unix seconds."""

    events: tuple[Event, ...]
    timestamp_s: float | None = None
    dp_rank: DpRank | None = None
    pod: PodId | None = None
    model: str | None = None


class DecodeFault(msgspec.Struct, frozen=True):
    """Something in a payload that could not be read. ``reason`` is short and bounded in number: a metric's label.

    ``harmless`` is true when no state can have been lost (an event type that this version does not know).
    """

    reason: str
    detail: str
    harmless: bool = False


class DecodedPayload(msgspec.Struct, frozen=True):
    """All that a payload said: batches in order, one a pod, and what could not be read."""

    batches: tuple[EventBatch, ...]
    faults: tuple[DecodeFault, ...] = ()


class Frame(msgspec.Struct, frozen=True):
    """One message of an event stream. ``received_ns``: unix time. ``seq`` None: the source has no sequence numbers."""

    topic: str
    seq: int | None
    payload: bytes
    received_ns: int


class StaleReason(enum.Enum):
    """Why a stream's entries may differ from the engine's cache.

    The first four may count too much (a removal was missed); the others only too little.
    """

    GAP = "gap"
    QUEUE_FULL = "queue_full"
    DECODE_ERROR = "decode_error"
    DISCONNECTED = "disconnected"
    HISTORY_INCOMPLETE = "history_incomplete"
    RESYNCING = "resyncing"


class StreamInfo(msgspec.Struct, frozen=True):
    """What the index knows of one stream."""

    stream: Stream
    model: str | None
    groups: Mapping[GroupIdx, GroupSpec]
    stale: StaleReason | None
    blocks: int
    """Engine blocks resident (in any tier and group)."""
    orphans: int
    """Engine blocks resident whose tokens are not known yet."""
    last_event_s: float | None
    """Engine timestamp of the last applied event, unix seconds."""


class Lookup(msgspec.Struct, frozen=True):
    """Who holds which of the asked blocks: position i answers key i. Holders beyond a gap are listed too."""

    keys: Sequence[BlockKey]
    holders: Sequence[Mapping[Slot, int]]
    """Copies by slot."""
    speculative: Sequence[Set[Stream]]
    """Streams that were promised the block and have not confirmed it."""
    streams: Mapping[Stream, StreamInfo]


class StreamScore(msgspec.Struct, frozen=True, gc=False):
    """What one stream holds of one prompt, and what that is worth to a scorer."""

    stream: Stream
    model: str | None
    score: float
    matched_blocks: int
    """Index blocks of the longest prefix that a request could reuse."""
    matched_tokens: int
    cached_tokens: int
    """The same under the engine's rule that the last token is always computed: at most prompt tokens - 1."""
    tiers: Mapping[Tier, int]
    """Matched blocks by the tier that they would be read from."""
    speculative: int
    """Matched blocks that rest on a promise only."""
    stale: StaleReason | None


class PromptScores(msgspec.Struct, frozen=True, gc=False):
    """Every candidate for a prompt, in no order."""

    streams: Sequence[StreamScore]
    keys: Sequence[BlockKey]
    """Of the whole index blocks in the prompt."""
    blocks_held: int
    """Of those, how many at least one stream holds or was promised."""

    @property
    def blocks(self) -> int:
        """How many whole index blocks there are in the prompt."""
        return len(self.keys)


class ApplyReport(msgspec.Struct):
    """What applying events did, in blocks."""

    stored: int = 0
    removed: int = 0
    cleared: int = 0
    duplicates: int = 0
    """Stored again while resident: one more copy."""
    removed_unknown: int = 0
    """Removals of blocks that the index does not hold."""
    orphaned: int = 0
    """Kept by engine hash only, because parent or tokens are unknown."""
    adopted: int = 0
    """Orphans whose keys became known."""
    orphans_dropped: int = 0
    """Orphans given up because their bound was reached."""
    refused: int = 0
    """Not kept: stored to more places (tier and group) than are told apart, or no record was free for them."""

    def add(self, other: ApplyReport) -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class IndexStats(msgspec.Struct, frozen=True):
    """Sizes of an index. ``bytes_estimated`` follows the accounting in the index's docstring."""

    blocks: int
    """Distinct block keys with a holder."""
    entries: int
    """(block key, slot) pairs."""
    orphans: int
    speculative: int
    streams: int
    pods: int
    bytes_estimated: int
    evicted_ttl: int
    evicted_size: int
    evicted_bytes: int
