"""The native index scores as Holdings, longest_prefix and the built-in scorers do, to the last bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("kvatlas._native")

from kvatlas.index.native import Weighing
from kvatlas.keys import as_token_array
from kvatlas.score import Holdings, TierWeights, load_scorer, longest_prefix
from kvatlas.types import BlockKey, PodId, StaleReason, Tier
from tests.models.lockstep import Lockstep
from tests.models.steps import EXAMPLES_FACTOR, SCHEMA, Engines, Pick, keys_of, one_of, prompt_of, runs, some_pods

SCORERS = {name: load_scorer(name) for name in ("longest-prefix", "highest-block-hit", "coverage")}
REASONS = list(StaleReason)
WEIGHTS = [0.0, 0.1, 0.3, 0.5, 0.5, 0.7, 0.8, 1.0, 1.0, 1.5]


def expected(
    cores: Lockstep,
    keys: Sequence[BlockKey],
    prompt_tokens: int,
    model: str | None,
    pods: Collection[PodId] | None,
    weighing: Weighing,
) -> tuple[dict[Any, Any], int]:
    """As :class:`kvatlas.Indexer` scores streams; ``model`` None: all are candidates."""
    holdings = Holdings(cores.reference.lookup(keys, pods), TierWeights(weighing.by_tier, weighing.unknown))
    rows = {}
    for stream, info in holdings.streams.items():
        hit = longest_prefix(holdings, stream, prompt_tokens, SCHEMA.block_size_tokens)
        score = SCORERS[weighing.scorer].score(holdings, stream, hit)
        if info.stale is not None:
            score *= weighing.stale_weight
        if model is None or info.model in (None, model) or score > 0:
            rows[stream.pod, stream.dp_rank] = (
                info.model,
                score,
                len(hit.tiers),
                hit.tokens,
                hit.cached_tokens,
                dict(Counter(hit.tiers)),
                hit.speculative,
                info.stale,
            )
    return rows, holdings.blocks_held


def answered(scores: Any) -> tuple[dict[Any, Any], int]:
    rows = {}
    for pod, rank, model, score, blocks, tokens, cached, tiers, speculative, stale in scores.rows():
        assert (pod, rank) not in rows
        reason = None if stale is None else REASONS[stale]
        rows[pod, rank] = (model, score, blocks, tokens, cached, dict(tiers), speculative, reason)
    return rows, scores.blocks_held


def weighing(pick: Pick) -> Weighing:
    named = [Tier(name) for name in ("gpu", "cpu", "disk", "other") if pick(4)]
    return Weighing(
        one_of(pick, list(SCORERS)),
        {tier: one_of(pick, WEIGHTS) for tier in named},
        one_of(pick, WEIGHTS),
        one_of(pick, [1.0, 0.5, 0.3, 0.0]),
    )


def compare_one(cores: Lockstep, engines: Engines, pick: Pick) -> None:
    """Ask both of one prompt, in one of the ways there are to ask."""
    number, root = pick(16), one_of(pick, ["m", "m", "n", "a", ""])
    model, pods, how = one_of(pick, ["m", "n", "x"]), some_pods(pick), weighing(pick)
    if pick(2):
        tokens = as_token_array(prompt_of(number, engines.prompt_tokens)[: 1 + pick(engines.prompt_tokens)])
        keys = SCHEMA.keys(tokens, model, lora_name=root)
        scores = cores.native.score(tokens, model, lora_name=root, pods=pods, weighing=how)
        (many,) = cores.native.score_many([tokens], model, pods=pods, weighing=how)
        assert answered(many) == expected(cores, SCHEMA.keys(tokens, model), len(tokens), model, pods, how)
        assert answered(scores) == expected(cores, keys, len(tokens), model, pods, how)
        return
    keys = keys_of(engines, number, pick(2), root)[: pick(engines.prompt_tokens // 4 + 1)]
    if pick(4) == 0:
        keys = keys + keys[:2]
    more_tokens = pick(9)
    asked = None if pick(2) else model
    scores = cores.native.find(keys, prompt_tokens=4 * len(keys) + more_tokens, pods=pods, model=asked, weighing=how)
    assert answered(scores) == expected(cores, keys, 4 * len(keys) + more_tokens, asked, pods, how)


ENGINES = {
    "index blocks": Engines((4,)),
    "mixed blocks": Engines((4, 4, 8, 2), "by prefix"),
    "long prompts": Engines((4, 4, 8), prompt_tokens=160),
}


@pytest.mark.parametrize("engines", ENGINES.values(), ids=ENGINES)
@settings(max_examples=80 * EXAMPLES_FACTOR, deadline=None)
@given(data=st.data())
def test_equal_for_any_state_and_question(engines: Engines, data: st.DataObject) -> None:
    limits, steps = data.draw(runs(engines, steps_max=12))
    cores = Lockstep(limits)
    cores.follow(steps)
    pick = data.draw(st.builds(lambda random: random.randrange, st.randoms(use_true_random=False)))
    for _ in range(8):
        compare_one(cores, engines, pick)
        cores.compare()
