"""What endpoints hold of a prompt, as a producer found it for one decision."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from kvatlas.route.endpoint import EndpointName
from kvatlas.types import StaleReason, Tier


class MatchSource(enum.Enum):
    """Where a match is from."""

    EVENTS = "events"
    """The index: the engine said so."""
    HISTORY = "history"
    """What was routed there before: the engine may have evicted it, or served others."""


class PrefixMatch(msgspec.Struct, frozen=True, gc=False):
    """What one endpoint holds of a prompt: a prefix without gaps."""

    tokens: int
    """In whole blocks, or up to the prompt's end. The last token may be among them, though an engine computes that always."""
    source: MatchSource
    tiers: Mapping[Tier, int] = {}
    """Tokens by the tier they would be read from; empty: all in GPU memory."""
    speculative_tokens: int = 0
    """Of these, how many rest on a decision that no event has confirmed yet."""
    stale: StaleReason | None = None
    """Why events may be missing, where they may."""
    cached_tokens: int | None = None
    """What the engine will report as cached, where that is known: whole blocks of its own, and never the last token."""
    worth_tokens: int | None = None
    """The same tokens weighted by tier and by staleness, in whole blocks; None: each counts in full."""

    @property
    def worth(self) -> int:
        """What the match is worth, in tokens of GPU memory that is known for sure."""
        return self.tokens if self.worth_tokens is None else self.worth_tokens


NO_MATCH = PrefixMatch(0, MatchSource.HISTORY)


class PrefixMatches(msgspec.Struct, frozen=True, gc=False):
    """What all endpoints hold of one prompt. Those that hold nothing may be missing."""

    by_endpoint: Mapping[EndpointName, PrefixMatch]
    block_size_tokens: int
    blocks: int
    """Blocks in the prompt, as this producer counts them."""

    def of(self, endpoint: EndpointName) -> PrefixMatch:
        return self.by_endpoint.get(endpoint, NO_MATCH)
