"""``prefix-cache-scorer``: how much of the prompt an endpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.matches import PrefixMatches
from kvatlas.route.plugins import Producer, Services


class PrefixCacheScorer:
    """The share of the prompt's blocks that an endpoint holds, mixed with the length that it holds.

    score = w * min(1, held tokens / scale)^2 + (1 - w) * held blocks / blocks of the prompt

    Blocks count by what they are worth: less in a slower tier. 0 for all where no producer found anything out.
    Source: llm-d-router, prefix-cache-scorer.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        prefix_match_info_producer_name: str = ""
        """Whose matches count; empty: those of the first producer that found any."""
        match_length_weight: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
        """``w``: 0 rates the share alone, 1 the length alone."""
        match_length_scale_tokens: int = 8192
        """``scale``: from so many tokens on, the length counts in full."""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        """Raises ConfigError where the producer is none, or a length shall count without a scale."""
        if parameters.match_length_weight > 0 and parameters.match_length_scale_tokens <= 0:
            raise ConfigError(
                f"{name}.matchLengthScaleTokens",
                f"{parameters.match_length_scale_tokens} with a matchLengthWeight above 0",
                "1 or more",
            )
        self.name = name
        self._producer = match_producer(name, parameters.prefix_match_info_producer_name, services)
        self._weight = parameters.match_length_weight
        self._scale_tokens = parameters.match_length_scale_tokens

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        found = cycle.matches_of(self._producer)
        shares = shares_held(found, candidates)
        weight = self._weight
        if found is None or not weight:
            return shares
        per_share = found.blocks * found.block_size_tokens / self._scale_tokens
        return [weight * min(1.0, share * per_share) ** 2 + (1.0 - weight) * share for share in shares]


def shares_held(found: PrefixMatches | None, candidates: Sequence[Candidate]) -> list[float]:
    """Return which share of a prompt's blocks every candidate holds, 0 to 1; 0 for all where nothing is known."""
    if found is None or not found.blocks:
        return [0.0] * len(candidates)
    held, blocks, size = found.by_endpoint, found.blocks, found.block_size_tokens
    shares = []
    for one in candidates:
        match = held.get(one.endpoint.name)
        # a block that the prompt's end cuts counts as a whole one
        shares.append(0.0 if match is None else min(1.0, -(-match.worth // size) / blocks))
    return shares


def match_producer(plugin: str, producer: str, services: Services) -> str | None:
    """Return the producer that a plugin's parameter names, None for an empty name. Raises ConfigError where it is none."""
    if not producer:
        return None
    if not isinstance(services.plugin(producer), Producer):
        raise ConfigError(
            f"{plugin}.prefixMatchInfoProducerName", f"{producer} finds no prefixes", "the name of a prefix cache producer"
        )
    return producer
