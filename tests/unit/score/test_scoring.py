"""Holders to scores: llm-d's golden values, tiers, groups, gaps, the last token."""

from __future__ import annotations

import pytest

from kvatlas.errors import RequestError
from kvatlas.score import Holdings, PrefixHit, TierWeights, load_scorer, longest_prefix, scorer_names
from kvatlas.types import (
    CPU,
    GPU,
    AttentionKind,
    BlockKey,
    GroupIdx,
    GroupSpec,
    Lookup,
    PodId,
    Slot,
    Stream,
    StreamInfo,
    Tier,
)

WEIGHTS = TierWeights({GPU: 1.0, CPU: 0.5})
POD = Stream(PodId("pod"))
FULL = {GroupIdx(0): GroupSpec(block_size_tokens=16)}


def holdings(
    blocks: list[dict[int, str] | str], groups: dict[GroupIdx, GroupSpec] | None = None, promised: tuple[int, ...] = ()
) -> Holdings:
    """``blocks``: a tier's name for one group, ``-`` for none, or a tier by group."""
    slots = []
    for block in blocks:
        tiers = {0: block} if isinstance(block, str) else block
        slots.append({Slot(POD, Tier(tier), GroupIdx(group)): 1 for group, tier in tiers.items() if tier != "-"})
    promises = [frozenset({POD}) if i in promised else frozenset() for i in range(len(blocks))]
    info = StreamInfo(POD, "m", FULL if groups is None else groups, None, 0, 0, None)
    return Holdings(Lookup([BlockKey(i) for i in range(len(blocks))], slots, promises, {POD: info}), WEIGHTS)


def hit_of(held: Holdings, prompt_tokens: int | None = None, block: int = 16) -> PrefixHit:
    return longest_prefix(held, POD, len(held.keys) * block if prompt_tokens is None else prompt_tokens, block)


@pytest.mark.parametrize(("blocks", "score"), [(["gpu"] * 3, 3.0), (["gpu", "gpu", "cpu"], 2.5), (["-", "gpu", "gpu"], 0.0)])
def test_longest_prefix_scores_llm_ds_golden_values(blocks: list[str], score: float) -> None:
    held = holdings(blocks)
    assert load_scorer("longest-prefix").score(held, POD, hit_of(held)) == score


def test_a_gap_ends_the_prefix_but_not_coverage_nor_the_highest_hit() -> None:
    held = holdings(["gpu", "-", "cpu", "-"])
    hit = hit_of(held)
    assert hit.tokens == 16
    assert load_scorer("coverage").score(held, POD, hit) == (1.0 + 0.5) / 4
    assert load_scorer("highest-block-hit").score(held, POD, hit) == 3.0


def test_an_unknown_medium_gets_the_low_weight() -> None:
    held = holdings(["gpu", "tape"])
    assert load_scorer("longest-prefix").score(held, POD, hit_of(held)) == 1.1


def test_the_best_tier_counts_where_a_block_is_in_several() -> None:
    slots = {Slot(POD, CPU): 1, Slot(POD, GPU): 2}
    info = StreamInfo(POD, "m", FULL, None, 0, 0, None)
    held = Holdings(Lookup([BlockKey(0)], [slots], [frozenset()], {POD: info}), WEIGHTS)
    assert hit_of(held).tiers == (GPU,)


@pytest.mark.parametrize(("prompt_tokens", "cached"), [(63, 48), (64, 48), (65, 64), (16, 0), (1, 0), (0, 0)])
def test_the_last_token_is_always_computed(prompt_tokens: int, cached: int) -> None:
    held = holdings(["gpu"] * (prompt_tokens // 16))
    assert hit_of(held, prompt_tokens).cached_tokens == cached


def test_predictions_are_whole_engine_blocks() -> None:
    """Engine blocks of 32 tokens, index blocks of 16: the half of a block that matches is of no use to the engine."""
    held = holdings(["gpu"] * 3, {GroupIdx(0): GroupSpec(block_size_tokens=32)})
    assert hit_of(held, 48).tokens == 32
    held = holdings(["gpu"] * 4, {GroupIdx(0): GroupSpec(block_size_tokens=32)})
    assert hit_of(held, 64).cached_tokens == 32


def test_index_blocks_larger_than_the_engines_round_down() -> None:
    held = holdings(["gpu"], {GroupIdx(0): GroupSpec(block_size_tokens=16)})
    assert hit_of(held, 100, block=64).cached_tokens == 64


HYBRID = {
    GroupIdx(0): GroupSpec(AttentionKind.FULL, None, 16),
    GroupIdx(1): GroupSpec(AttentionKind.SLIDING_WINDOW, 33, 16),  # reads ceil(32 / 16) = 2 blocks back
}


@pytest.mark.parametrize(
    ("sliding", "tokens"),
    [("gggg", 64), ("--gg", 64), ("-gg-", 48), ("---g", 0), ("g--g", 16), ("gg--", 32), ("----", 0)],
)
def test_a_hybrid_hit_needs_the_last_window_of_every_sliding_group(sliding: str, tokens: int) -> None:
    held = holdings([{0: "gpu", 1: "gpu" if char == "g" else "-"} for char in sliding], HYBRID)
    assert hit_of(held).tokens == tokens


def test_a_hybrid_hit_needs_full_attention_unbroken_in_any_tier() -> None:
    blocks = [{0: "cpu", 1: "gpu"}, {0: "gpu", 1: "gpu"}, {1: "gpu"}]
    hit = hit_of(holdings(blocks, HYBRID))
    assert hit.tokens == 32
    assert hit.tiers == (CPU, GPU)


def test_recurrent_state_is_needed_only_where_the_hit_ends() -> None:
    groups = {GroupIdx(0): GroupSpec(block_size_tokens=16), GroupIdx(1): GroupSpec(AttentionKind.STATE, None, 32)}
    blocks = [{0: "gpu"}, {0: "gpu", 1: "gpu"}, {0: "gpu"}, {0: "gpu"}]
    assert hit_of(holdings(blocks, groups)).tokens == 32


def test_groups_that_are_not_prefix_cached_need_nothing() -> None:
    groups = {GroupIdx(0): GroupSpec(block_size_tokens=16), GroupIdx(1): GroupSpec(AttentionKind.IGNORED)}
    assert hit_of(holdings(["gpu", "gpu"], groups)).tokens == 32


def test_a_promised_block_counts_and_is_told_apart() -> None:
    hit = hit_of(holdings(["gpu", "-"], promised=(0, 1)))
    assert hit.tokens == 32
    assert hit.speculative == 2


def test_an_unknown_scorer_is_refused_with_the_known_names() -> None:
    assert {"longest-prefix", "highest-block-hit", "coverage"} <= set(scorer_names())
    with pytest.raises(RequestError, match="longest-prefix"):
        load_scorer("fastest")
