"""``context-length-aware``: prompts go to engines that are labelled for their length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

import msgspec

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.plugins import Services

LABEL = "llm-d.ai/context-length-range"
LABELS_CACHED_MAX = 1024
_RANGE = re.compile(r"\s*(\d{1,18})\s*-\s*(\d{1,18})\s*", re.ASCII)

OUTSIDE_MAX = 0.3
"""What a range that the prompt just misses is worth; one that it is in is worth more."""
UNLABELLED = 0.5


class Range(msgspec.Struct, frozen=True):
    """Prompt lengths in tokens, both ends included."""

    least: int
    most: int


class ContextLengthAware:
    """Rates ranges around the prompt's length, best the narrow ones with room above it; others by how near they are.

    in range:  .3 + .7 * (.7 / (1 + width / 10000) + .3 * (most - length) / width), 1 where width is 0
    outside:   .3 / (1 + distance / 1000)
    no label:  .5; a label that is no range: 0

    As a filter (``enable_filtering``) it keeps who is in range and who has no label. A prompt whose length is not known counts
    as 0 tokens. Source: llm-d-router, context-length-aware.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        label: Annotated[str, msgspec.Meta(min_length=1)] = LABEL
        """Its value is ``min-max``."""
        enable_filtering: bool = False

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self.name = name
        self._label = parameters.label
        self._filtering = parameters.enable_filtering

    def filter(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        if not self._filtering:
            return candidates
        label, length = self._label, cycle.request.prompt_tokens
        kept = []
        for one in candidates:
            text = one.endpoint.labels.get(label)
            if text is None or ((span := _range(text)) is not None and span.least <= length <= span.most):
                kept.append(one)
        return kept

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        label, length = self._label, cycle.request.prompt_tokens
        scores = []
        unreadable = 0
        for one in candidates:
            text = one.endpoint.labels.get(label)
            if text is None:
                scores.append(UNLABELLED)
            elif (span := _range(text)) is None:
                unreadable += 1
                scores.append(0.0)
            else:
                scores.append(fit(length, span))
        if unreadable:
            cycle.notes.append(f"{self.name}: {unreadable} endpoints have a label {label} that is no range min-max")
        return scores


def fit(length: int, span: Range) -> float:
    """Return how well a range suits a prompt of so many tokens."""
    if length > span.most:
        return OUTSIDE_MAX / (1.0 + (length - span.most) / 1000.0)
    if length < span.least:
        return OUTSIDE_MAX / (1.0 + (span.least - length) / 1000.0)
    width = span.most - span.least
    if not width:
        return 1.0
    narrow = 1.0 / (1.0 + width / 10_000.0)
    headroom = (span.most - length) / width
    return OUTSIDE_MAX + (1.0 - OUTSIDE_MAX) * (0.7 * narrow + 0.3 * headroom)


@lru_cache(maxsize=LABELS_CACHED_MAX)
def _range(label: str) -> Range | None:
    """Return what ``min-max`` says; None where it says nothing."""
    found = _RANGE.fullmatch(label)
    if found is None:
        return None
    least, most = int(found[1]), int(found[2])
    return Range(least, most) if least <= most else None
