"""What was decided, with all that led to it: cheap to make for every request, written out only where somebody looks."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from kvatlas.route.cycle import Candidate
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.matches import PrefixMatches
from kvatlas.route.plugins import ExplainedScores
from kvatlas.route.request import RouteRequest


class Dropped(msgspec.Struct, frozen=True):
    """Candidates that a filter left out."""

    filter: str
    endpoints: tuple[EndpointName, ...]


class Rating(msgspec.Struct, frozen=True):
    """One scorer's numbers, in the order of the run's candidates."""

    scorer: str
    weight: float
    scores: tuple[float, ...]
    """Clamped to 0 to 1, not weighted."""
    explained: ExplainedScores | None = None
    """What they were made of, where the scorer says it: ``explained.parts(at)`` for candidate number ``at`` of the run."""


class ProfileRun(msgspec.Struct, frozen=True, kw_only=True):
    """What one profile did."""

    profile: str
    candidates: tuple[Candidate, ...]
    """Those that the filters left."""
    dropped: tuple[Dropped, ...]
    ratings: tuple[Rating, ...]
    totals: tuple[float, ...]
    picked: tuple[Candidate, ...]


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request goes, and why."""

    request: RouteRequest
    at_s: float
    """Seconds since the epoch."""
    targets: tuple[Endpoint, ...]
    """Best first; further ones are for retries."""
    prefill: Endpoint | None = None
    """Who computes the prompt, where that is not the target."""
    encoders: tuple[Endpoint, ...] = ()
    runs: Mapping[str, ProfileRun | None]
    """By profile; None where its filters left nobody."""
    matches: Mapping[str, PrefixMatches]
    """By producer."""
    notes: tuple[str, ...] = ()
    took_s: float = 0.0
    """Time spent deciding."""

    @property
    def target(self) -> Endpoint:
        return self.targets[0]

    @property
    def computes_prompt(self) -> Endpoint:
        """Who computes the prompt: the prefill endpoint, else the target."""
        return self.prefill or self.target

    @property
    def first_matches(self) -> PrefixMatches | None:
        """What the first producer found, which is what predictions go by; None where none did its work."""
        return next(iter(self.matches.values()), None)

    @property
    def predicted_cached_tokens(self) -> int | None:
        """How much of the prompt its computer holds: what the engine should report. None where nothing could tell."""
        found = self.first_matches
        if found is None:
            return None
        match = found.of(self.computes_prompt.name)
        tokens = match.tokens if match.cached_tokens is None else match.cached_tokens
        return min(tokens, max(0, self.request.prompt_tokens - 1))
