"""``prefix-cache-affinity-filter``: only who holds the prompt stays, unless that costs too much time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.plugins import Services
from kvatlas.route.scorers.prefix import match_producer, shares_held


class PrefixCacheAffinityFilter:
    """Keeps the *sticky* candidates: those that hold ``affinity_threshold`` of the prompt's blocks or more.

    All stay where nobody is sticky, where chance says so, and where the fastest sticky one would take longer to the first token
    than the fastest other one by more than ``maxTTFTPenaltyMs``. Source: llm-d-router, prefix-cache-affinity-filter.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        affinity_threshold: Annotated[float, msgspec.Meta(le=1)] = 0.8
        """Share of blocks; 0 and less turns the filter off."""
        exploration_probability: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
        """How often all candidates stay whatever they hold."""
        max_ttft_penalty_ms: Annotated[float, msgspec.Meta(ge=0)] = msgspec.field(default=18_000.0, name="maxTTFTPenaltyMs")
        """0: whatever the time."""
        ttft_source: Literal["prefillThroughput", "latencyPredictor"] = "prefillThroughput"
        peak_prefill_throughput: Annotated[float, msgspec.Meta(ge=0)] = 15_928.0
        """Tokens a second that an engine prefills."""
        prefix_match_info_producer_name: str = ""
        latency_prediction_info_producer_name: str = ""
        in_flight_load_producer_name: str | None = None
        """Without effect: there is one count of what is in flight."""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        """Raises ConfigError where the time cannot be told, or the producer is none."""
        predicted = parameters.ttft_source == "latencyPredictor"
        if not predicted and parameters.max_ttft_penalty_ms > 0 and parameters.peak_prefill_throughput == 0:
            raise ConfigError(
                f"{name}.peakPrefillThroughput",
                "0 with ttftSource prefillThroughput and a maxTTFTPenaltyMs above 0",
                "tokens a second, above 0",
            )
        self.name = name
        self._parameters = parameters
        self._predicted = predicted
        self._match_producer = match_producer(name, parameters.prefix_match_info_producer_name, services)
        self._latency_producer = parameters.latency_prediction_info_producer_name or None

    def filter(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        asked = self._parameters
        threshold = asked.affinity_threshold
        if len(candidates) <= 1 or threshold <= 0:
            return candidates
        if asked.exploration_probability and cycle.random.random() < asked.exploration_probability:
            cycle.notes.append(f"{self.name}: explores, all candidates stay")
            return candidates
        shares = shares_held(cycle.matches_of(self._match_producer), candidates)
        sticky = [one for one, share in zip(candidates, shares, strict=True) if share >= threshold]
        if not sticky or len(sticky) == len(candidates):
            return candidates
        if asked.max_ttft_penalty_ms > 0:
            others = [one for one, share in zip(candidates, shares, strict=True) if share < threshold]
            penalty_ms = self._best_ttft_ms(cycle, sticky) - self._best_ttft_ms(cycle, others)
            if penalty_ms > asked.max_ttft_penalty_ms:
                cycle.notes.append(
                    f"{self.name}: who holds the prompt would take {penalty_ms:.0f} ms longer, all candidates stay"
                )
                return candidates
        return sticky

    def _best_ttft_ms(self, cycle: Cycle, candidates: Sequence[Candidate]) -> float:
        """Return the least time to the first token; infinity where none is predicted."""
        if not self._predicted:
            tokens = min(one.load.in_flight.prefill_tokens for one in candidates)
            return tokens / self._parameters.peak_prefill_throughput * 1000
        predictions = cycle.latencies_of(self._latency_producer) or {}
        known = [predictions[one.endpoint.name].ttft_s for one in candidates if one.endpoint.name in predictions]
        return min(known) * 1000 if known else math.inf
