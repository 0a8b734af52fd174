"""``no-hit-lru-scorer``: prompts that nobody holds go around, so that caches fill evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.plugins import Services
from kvatlas.route.scorers.prefix import match_producer


class NoHitLruScorer:
    """For a prompt that no candidate holds any of: 1 for who had such a one longest ago or never, 0 for who had the last one.

    Evenly spaced between; those that never had one first, in the candidates' order. 0.5 for all where somebody holds a token,
    1 for a single candidate. Ranks count candidates alone (llm-d's count everybody remembered, so that those of another role
    push them to 0). Source: llm-d-router, no-hit-lru-scorer.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        lru_size: Annotated[int, msgspec.Meta(gt=0)] = 1024
        """How many endpoints are remembered; of more, those whose turn is longest ago count as new."""
        prefix_match_info_producer_name: str = ""
        """Whose matches count; empty: those of the first producer that found any."""
        prefix_plugin_type: str | None = None
        prefix_plugin_name: str | None = None
        """Both without effect, as in llm-d."""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        """Raises ConfigError where the producer is none."""
        self.name = name
        self._producer = match_producer(name, parameters.prefix_match_info_producer_name, services)
        self._size = parameters.lru_size
        self._turns: dict[EndpointName, int] = {}
        """When each had its last prompt that nobody held, as a count of them; longest ago first."""
        self._count = 0

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        found = cycle.matches_of(self._producer)
        held = {} if found is None else found.by_endpoint
        for one in candidates:
            if (match := held.get(one.endpoint.name)) is not None and match.tokens > 0:
                cycle.kept.pop(self.name, None)
                return [0.5] * len(candidates)
        cycle.kept[self.name] = True
        last = len(candidates) - 1
        if not last:
            return [1.0]
        turns = [self._turns.get(one.endpoint.name, 0) for one in candidates]
        scores = [0.0] * len(candidates)
        for rank, position in enumerate(sorted(range(len(candidates)), key=turns.__getitem__)):
            scores[position] = 1.0 - rank / last
        return scores

    def decided(self, cycle: Cycle, decision: Decision) -> None:
        if self.name in cycle.kept:
            self._took_turn(decision.target.name)
            if decision.prefill is not None:
                self._took_turn(decision.prefill.name)

    def _took_turn(self, endpoint: EndpointName) -> None:
        self._count += 1
        self._turns.pop(endpoint, None)
        self._turns[endpoint] = self._count
        if len(self._turns) > self._size:
            del self._turns[next(iter(self._turns))]
