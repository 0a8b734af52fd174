"""The time to first token that is to be expected of one endpoint, in parts. Pure: what is learnt is passed in.

    TTFT = queue + prefill + decode wait + tier load
    price = TTFT + what others behind will wait longer for this prompt's own work + what answers in progress will

Source: the sum is Mooncake's (queue + prefill by length and cached prefix + transfer, FAST 2025, algorithm 1) with queues
counted in tokens as Dynamo's KV router does; figures are learnt here, not configured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from kvatlas.route.load import EngineReport, Load, attention_pairs
from kvatlas.route.matches import MatchSource, PrefixMatch
from kvatlas.types import CPU, GPU, Tier

BEHIND_MAX = 32.0
"""Requests behind this one that count at most: a copy of a prefix is worth something too, to those who use it."""
ANSWER_WEIGHT = 0.25
"""What a second within an answer weighs against one before it: users wait for the first token, and read the others."""
FOLLOWER_WEIGHT = 0.25
"""What a request that will follow counts of one that is here."""
KV_FULL = 0.9
"""From this usage on, a prompt may have to wait for KV blocks."""


class Costs(msgspec.Struct, frozen=True):
    """What holds for the whole fleet."""

    request_s: float = 0.02
    """Of a request, whatever its length: network, scheduling, the step that makes the first token."""
    token_s: float = 1e-4
    """Of a prompt token that is computed, at an engine of slowness 1, without what attention costs."""
    pair_s: float = 3.3e-9
    """Of a pair of tokens that attention is computed of, the same: the longer a prompt, the longer each of its tokens takes.
    Default: at 30,000 tokens before it as much as all else, as with dense models of 8 billion parameters and more."""
    decode_s: float = 2.0
    """From a request's first token until its end, on average: how long it occupies a slot."""
    uncached_tokens: float = 1_000.0
    """That an average request computes."""
    followers: float = 0.0
    """How often a computed token is used again: those who come for it come to where it is."""
    crowd_s: float = 0.0
    """By which a request delays each answer in progress at an engine of slowness 1, from its first token to its end."""
    tier_token_s: Mapping[Tier, float] = msgspec.field(default_factory=lambda: {CPU: 8e-6})
    """Of a token that is loaded from a tier. Default: 128 KiB a token (8 billion parameters, GQA) at 16 GB/s."""
    unknown_tier_token_s: float = 5e-5
    """Of a tier that is not named: the same at 2.6 GB/s (disk, network)."""


class Traits(msgspec.Struct, frozen=True):
    """What holds for one endpoint."""

    slowness: float = 1.0
    """Its time for the same work over the fleet's."""
    trust: Mapping[MatchSource, float] = msgspec.field(default_factory=lambda: dict.fromkeys(MatchSource, 1.0))
    """By source: the share of predicted cached tokens that turn out to be cached."""
    samples: int = 0
    slots: int | None = None
    """Requests that it runs at the same time; None: it never showed a limit."""


class Expected(NamedTuple):
    """Seconds, part by part; and what they were made from."""

    queue_s: float
    """Prompts ahead: those sent from here, and those that the engine says are waiting beyond them."""
    prefill_s: float
    """This prompt's own."""
    decode_wait_s: float
    """Beyond the queue: until a slot or KV blocks are free."""
    tier_load_s: float
    others_delayed_s: float
    """That requests behind this one will wait longer for it, all together. No part of its TTFT, but of its price."""
    answers_delayed_s: float
    """The same of answers in progress, which stand still while this prompt is computed and come more slowly beside its
    answer, and beside those of requests that will follow it here; as far as that weighs (``ANSWER_WEIGHT``)."""
    elapsed_s: float
    """Since the first prompt ahead may be computed."""
    requests_ahead: float
    tokens_ahead: float
    pairs_ahead: float
    uncached_tokens: float

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prefill_s + self.decode_wait_s + self.tier_load_s

    @property
    def price_s(self) -> float:
        """What candidates are compared by."""
        delayed_s = self.others_delayed_s + self.answers_delayed_s
        return self.queue_s + self.prefill_s + self.decode_wait_s + self.tier_load_s + delayed_s


def expect(
    costs: Costs,
    traits: Traits,
    load: Load,
    match: PrefixMatch,
    prompt_tokens: int,
    behind_per_s: float = 0.0,
    crowd: float = 0.0,
    now_s: float = 0.0,
) -> Expected:
    """Return what to expect of an endpoint for a prompt of so many tokens.

    ``behind_per_s``: who else comes; ``crowd``: answers that this one will be beside.
    """
    in_flight, report = load.in_flight, load.report
    cached = match.tokens * traits.trust[match.source]
    uncached = max(1.0, prompt_tokens - cached)
    ahead, tokens_ahead = float(in_flight.prefill_requests), float(in_flight.prefill_tokens)
    pairs_ahead = float(in_flight.prefill_pairs)
    if report is not None:
        then = load.prefills_reported
        if (foreign := report.waiting - (ahead if then is None else then)) > 0:
            ahead += foreign
            tokens_ahead += foreign * costs.uncached_tokens
            pairs_ahead += foreign * attention_pairs(costs.uncached_tokens, costs.uncached_tokens)
    slowness = traits.slowness
    queue_s = slowness * (costs.request_s * ahead + costs.token_s * tokens_ahead + costs.pair_s * pairs_ahead)
    ahead_s, elapsed_s = queue_s, 0.0
    if (since_s := in_flight.first_since_s) is not None:
        elapsed_s = now_s - since_s if now_s > since_s else 0.0
        first_s = slowness * _prefill_s(costs, in_flight.first_tokens, in_flight.first_pairs)
        queue_s += abs(first_s - elapsed_s) - first_s  # overdue: as long again as it is overdue
    admission_s = 0.0
    if traits.slots is not None:
        admission_s = _slot_wait_s(costs, traits.slots, load)
    if report is not None and report.kv_usage >= KV_FULL:
        admission_s = max(admission_s, _kv_wait_s(costs, report, prompt_tokens + tokens_ahead))
    prefill_s = slowness * _prefill_s(costs, uncached, attention_pairs(uncached, max(uncached, prompt_tokens)))
    tier_load_s = _tier_load_s(costs, match) if match.tiers else 0.0
    return Expected(
        queue_s,
        prefill_s,
        max(0.0, admission_s - queue_s),
        tier_load_s,
        _others_delayed_s(behind_per_s, max(ahead_s, admission_s), prefill_s + tier_load_s),
        _answers_delayed_s(
            crowd,
            prefill_s + slowness * costs.crowd_s,
            1 + FOLLOWER_WEIGHT * costs.followers * uncached / max(1, prompt_tokens),
        ),
        elapsed_s,
        ahead,
        tokens_ahead,
        pairs_ahead,
        uncached,
    )


def _prefill_s(costs: Costs, tokens: float, pairs: float) -> float:
    """Seconds for one prompt at an engine of slowness 1."""
    return costs.request_s + costs.token_s * tokens + costs.pair_s * pairs


def _others_delayed_s(behind_per_s: float, busy_s: float, work_s: float) -> float:
    """Whoever arrives before the queue is empty waits for this work too; those who arrive during it for half of it."""
    return work_s * min(behind_per_s * (busy_s + work_s / 2), BEHIND_MAX)


def _answers_delayed_s(crowd: float, delay_s: float, requests: float) -> float:
    """This request delays each answer beside it, and so will those that come here because of what it computes here."""
    return ANSWER_WEIGHT * crowd * delay_s * requests


def _slot_wait_s(costs: Costs, slots: int, load: Load) -> float:
    """A slot gets free every ``decode_s / slots``; so many have to get free as there are requests too many."""
    report = load.report
    said = 0 if report is None else report.running + report.waiting
    excess = max(load.in_flight.requests, said) + 1 - slots
    return max(0, excess) * costs.decode_s / slots


def _kv_wait_s(costs: Costs, report: EngineReport, needed_tokens: float) -> float:
    """Blocks get free at the rate at which those in use turn over, once every ``decode_s``."""
    if report.gpu_blocks and report.block_size_tokens:
        capacity = report.gpu_blocks * report.block_size_tokens
        missing = needed_tokens - (1.0 - report.kv_usage) * capacity
        return max(0.0, missing) * costs.decode_s / (report.kv_usage * capacity)
    return (report.waiting + 1) * costs.decode_s / max(1, report.running)


def _tier_load_s(costs: Costs, match: PrefixMatch) -> float:
    known = costs.tier_token_s
    return sum(tokens * known.get(tier, costs.unknown_tier_token_s) for tier, tokens in match.tiers.items() if tier != GPU)
