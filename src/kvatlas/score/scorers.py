"""Ways to turn what a cache holds into one number; the more the better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast

from kvatlas.errors import RequestError
from kvatlas.score.holdings import Holdings
from kvatlas.score.prefix import PrefixHit
from kvatlas.types import Stream

SCORERS = "kvatlas.scorers"
"""Entry point group that scorers are found in, by name."""


class Scorer(Protocol):
    """Scores one stream for one prompt."""

    def score(self, holdings: Holdings, stream: Stream, hit: PrefixHit) -> float:
        """Return a score of 0 or more, in weighted index blocks unless the scorer says otherwise."""
        ...


class LongestPrefix:
    """The sum of tier weights over the longest reusable prefix.

    Four blocks in GPU memory score 4.0; with a CPU weight of 0.5, two of them there score 3.0.
    """

    def score(self, holdings: Holdings, stream: Stream, hit: PrefixHit) -> float:
        return _sum(holdings.weights.of(tier) * blocks for tier, blocks in sorted(Counter(hit.tiers).items()))


class HighestBlockHit:
    """The number of the last block held, gaps or not: what a cache reaches if the blocks between are computed or loaded."""

    def score(self, holdings: Holdings, stream: Stream, hit: PrefixHit) -> float:
        return float(max((i + 1 for i, weight in enumerate(holdings.held_anyhow(stream)) if weight > 0), default=0))


class Coverage:
    """The share of the prompt's blocks held anywhere in the stream, tier-weighted, gaps or not; 0 to 1."""

    def score(self, holdings: Holdings, stream: Stream, hit: PrefixHit) -> float:
        if not holdings.keys:
            return 0.0
        by_weight = Counter(holdings.held_anyhow(stream))
        return _sum(weight * blocks for weight, blocks in sorted(by_weight.items())) / len(holdings.keys)


def _sum(values: Iterable[float]) -> float:
    """Add one by one, so that every core and every Python comes to the same bits (``sum`` compensates from 3.12 on)."""
    total = 0.0
    for value in values:
        total += value
    return total


@cache
def _installed() -> tuple[EntryPoint, ...]:
    """Return what is installed, which costs a look into every package, and does not change while a process runs."""
    return tuple(entry_points(group=SCORERS))


def scorer_names() -> list[str]:
    """Return the names of all installed scorers."""
    return sorted({found.name for found in _installed()})


def load_scorer(name: str) -> Scorer:
    """Return a scorer by name; RequestError with the known names where there is none."""
    for found in _installed():
        if found.name == name:
            return cast("Scorer", found.load()())
    raise RequestError("scorer", f"{name!r} is not installed", f"use one of {', '.join(scorer_names())}")
