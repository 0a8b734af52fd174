"""What a query asks and what an answer says: shared by the library, HTTP, gRPC and the command line."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from kvatlas.keys.tokens import TokenIds
from kvatlas.types import BlockKey, DpRank, GroupIdx, MultimodalItem, PodId, StaleReason, Tier


class Query(msgspec.Struct, frozen=True, gc=False):
    """One prompt, as an engine would see it.

    ``model``: the served model's name; ``lora_name`` takes its place where an adapter is asked for. ``pods`` None means all.
    """

    token_ids: TokenIds
    model: str
    lora_name: str | None = None
    cache_salt: str | None = None
    multimodal: tuple[MultimodalItem, ...] = ()
    pods: frozenset[PodId] | None = None
    scorer: str | None = None
    """A scorer's name; None means the configured one."""


class TokensFailure(msgspec.Struct, frozen=True):
    """Why a prompt's tokens could not be told."""

    reason: str
    """One of kvatlas.errors.TokenizationReason."""
    field: str
    problem: str
    remedy: str


class TokensInfo(msgspec.Struct, frozen=True):
    """Where the tokens of a prompt that came as text or chat are from, and how far they go."""

    source: str
    """local, store (the same, with a known prefix), renderer, service; none where there are no tokens."""
    tokenizer: str | None
    revision: str | None
    exact: bool
    """They are what the engine sees; false only where there are none."""
    complete: bool
    """False: the first tokens only, as those were known at once. Scores are lower bounds then."""
    count: int
    from_store: int
    """How many a prefix store knew."""
    failure: TokensFailure | None = None
    estimated_count: int | None = None
    """About how many there would be, from the text's length, where there are none. Nothing is scored by it."""


class PodScore(msgspec.Struct, frozen=True):
    """What one pod holds of a prompt. Figures are those of its best rank: a prefix cannot be pieced together from two."""

    pod: PodId
    model: str | None
    score: float
    matched_blocks: int
    """Index blocks of the longest prefix that a request could reuse."""
    matched_tokens: int
    predicted_cached_tokens: int
    """What the engine will report as cached_tokens: whole engine blocks, and never the last token, which it computes always."""
    tiers: Mapping[Tier, int]
    """Matched blocks by the tier that they would be read from."""
    dp_rank: DpRank
    predicted_by_rank: Mapping[DpRank, int]
    speculative_blocks: int
    """Matched blocks that rest on a promise only (a routed request whose events have not come yet)."""
    stale: bool
    stale_reason: StaleReason | None


class ScoreResult(msgspec.Struct, frozen=True):
    """All candidates, best first; equal scores are ordered by pod name. Empty where no pod serves the model."""

    pods: tuple[PodScore, ...]
    scorer: str
    prompt_tokens: int
    blocks: int
    """Whole index blocks in the prompt."""
    cache_hits: int
    """Of those, how many at least one candidate holds."""
    coverage: float
    """cache_hits / blocks; 0 for a prompt without a whole block."""
    tokens: TokensInfo | None = None
    """Of a prompt that came as text or chat; None where its token ids were given."""


class Holder(msgspec.Struct, frozen=True):
    """One place where a block lies."""

    pod: PodId
    dp_rank: DpRank
    tier: Tier
    group: GroupIdx
    copies: int
    speculative: bool
    stale: bool


class BlockLocality(msgspec.Struct, frozen=True):
    key: BlockKey
    holders: tuple[Holder, ...]


class PodStatus(msgspec.Struct, frozen=True):
    """One stream (rank of a pod) as an operator wants to see it."""

    pod: PodId
    dp_rank: DpRank
    model: str | None
    state: str
    """fresh, stale, connecting (no event seen yet)."""
    stale_reason: StaleReason | None
    blocks: int
    orphans: int
    block_sizes_tokens: tuple[int, ...]
    groups: Mapping[GroupIdx, str]
    next_seq: int | None
    queue_depth: int
    gaps: int
    replays: int
    """Replays that brought frames: after a gap, at first contact, or found by an audit."""
    replay_answers: bool | None
    """Whether the engine answered the last question for frames; None without a replay endpoint, or before the first."""
    restarts: int
    last_event_age_s: float | None
    source: str
    tiers: tuple[Tier, ...] = ()
    """Where its events said that blocks were stored to, since its cache began anew."""
    replay_problem: str | None = None
    """Why ``replay_answers`` is false: nothing came, or frames were missing in what came."""
