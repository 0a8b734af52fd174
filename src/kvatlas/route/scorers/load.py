"""Scorers of load: what engines report, and what is in flight from here.

An engine that has not reported yet counts as idle (no queue, nothing running, no KV cache in use), and a report holds until the
next one however old it is: so llm-d's scorers read it too. Who is stale for too long is the saturation detector's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.plugins import NoParameters, Services


class KvCacheUtilizationScorer:
    """1 less the share of KV blocks in use. Source: llm-d-router, kv-cache-utilization-scorer (in 2025 kv-cache-scorer)."""

    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        self.name = name

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        return [1.0 if (report := one.load.report) is None else 1.0 - report.kv_usage for one in candidates]


class QueueScorer:
    """1 for the shortest queue, 0 for the longest one. Source: llm-d-router, queue-scorer."""

    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        self.name = name

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        return _least_first(waiting(candidates))


class RunningRequestsSizeScorer:
    """1 for the fewest running requests, 0 for the most. Source: llm-d-router, running-requests-size-scorer."""

    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        self.name = name

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        return _least_first([0 if (report := one.load.report) is None else report.running for one in candidates])


class LoadAwareScorer:
    """0.5 for an empty queue, falling to 0 at ``threshold`` requests. Source: llm-d-router, load-aware-scorer."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        threshold: Annotated[int, msgspec.Meta(gt=0)] = 128

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self.name = name
        self._threshold = parameters.threshold

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        threshold = self._threshold
        return [0.5 * (1.0 - min(queue, threshold) / threshold) for queue in waiting(candidates)]


class ActiveRequestScorer:
    """1 for the idle; the others fall from ``max_busy_score`` to 0 for who has the most requests in flight from here.

    Source: llm-d-router, active-request-scorer.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        idle_threshold: Annotated[int, msgspec.Meta(ge=0)] = 0
        """Up to so many requests are idle."""
        max_busy_score: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
        request_timeout: str | None = None
        """Without effect, as in llm-d since 0.9: a request counts until it ends."""
        in_flight_load_producer_name: str | None = None
        """Without effect: there is one count of what is in flight."""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self.name = name
        self._idle_threshold = parameters.idle_threshold
        self._max_busy_score = parameters.max_busy_score

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        counts = [one.load.in_flight.requests for one in candidates]
        most, idle, best = max(counts), self._idle_threshold, self._max_busy_score
        return [1.0 if count <= idle else (most - count) / most * best for count in counts]


class TokenLoadScorer:
    """1 less the prefill that an endpoint would have to do, as a share of ``queue_threshold_tokens``; 0 from there on.

    Counted are the tokens that requests from here still have it compute, and those of this request that it does not hold.
    Source: llm-d-router, token-load-scorer (with the inflight-load-producer's defaults).
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        queue_threshold_tokens: Annotated[int, msgspec.Meta(gt=0)] = 4_194_304
        in_flight_load_producer_name: str | None = None
        """Without effect: there is one count of what is in flight."""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self.name = name
        self._threshold = parameters.queue_threshold_tokens

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        threshold = self._threshold
        prompt_tokens = cycle.request.prompt_tokens
        found = cycle.matches_of()
        held = {} if found is None else found.by_endpoint
        scores = []
        for one in candidates:
            match = held.get(one.endpoint.name)
            uncached = prompt_tokens if match is None else max(0, prompt_tokens - match.tokens)
            scores.append(1.0 - min(1.0, (one.load.in_flight.prefill_tokens + uncached) / threshold))
        return scores


def waiting(candidates: Sequence[Candidate]) -> list[int]:
    """Return the length of every candidate's queue; 0 where it is not known."""
    return [0 if (report := one.load.report) is None else report.waiting for one in candidates]


def _least_first(values: list[int]) -> list[float]:
    """Return 1 for the least, 0 for the most, those between in proportion; 1 for all where they are equal."""
    most = max(values)
    span = most - min(values)
    return [(most - value) / span for value in values] if span else [1.0] * len(values)
