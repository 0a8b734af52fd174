"""A scheduling profile: filters, then weighted scorers, then a picker."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Dropped, ProfileRun, Rating
from kvatlas.route.plugins import ExplainedScores, Filter, Picker, Scorer


class NamedFilter(msgspec.Struct, frozen=True):
    name: str
    plugin: Filter


class WeightedScorer(msgspec.Struct, frozen=True):
    name: str
    plugin: Scorer
    weight: float = 1.0


class Profile(msgspec.Struct, frozen=True):
    """One way to choose among candidates."""

    name: str
    filters: tuple[NamedFilter, ...]
    scorers: tuple[WeightedScorer, ...]
    picker: Picker

    def run(self, cycle: Cycle, candidates: Sequence[Candidate]) -> ProfileRun | None:
        """Choose; None where the filters leave nobody. A scorer's numbers are clamped to 0 to 1, then weighted and added.

        Source: llm-d's scheduler (weights are not normalised).
        """
        dropped = []
        for step in self.filters:
            if not candidates:
                break
            kept = step.plugin.filter(cycle, candidates)
            if len(kept) < len(candidates):
                names = {candidate.name for candidate in kept}
                dropped.append(Dropped(step.name, tuple(one.name for one in candidates if one.name not in names)))
            candidates = kept
        if not candidates:
            return None
        totals = [0.0] * len(candidates)
        ratings = []
        for scorer in self.scorers:
            scored = scorer.plugin.score(cycle, candidates)
            scores = tuple([(score if score < 1.0 else 1.0) if score > 0.0 else 0.0 for score in scored])  # NaN is 0
            assert len(scores) == len(candidates), f"{scorer.name} scored {len(scores)} of {len(candidates)} candidates"
            explained = scored if isinstance(scored, ExplainedScores) else None
            ratings.append(Rating(scorer.name, scorer.weight, scores, explained))
            totals = [total + score * scorer.weight for total, score in zip(totals, scores, strict=True)]
        picked = self.picker.pick(cycle, candidates, totals)
        return ProfileRun(
            profile=self.name,
            candidates=tuple(candidates),
            dropped=tuple(dropped),
            ratings=tuple(ratings),
            totals=tuple(totals),
            picked=tuple(picked),
        )
