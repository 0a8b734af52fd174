"""How busy the pool is, as one number: below 1 there is room, from 1 on there is none.

Detectors are filters too: as such they leave out single endpoints that are over their limits, with some headroom.
Source: llm-d-router, ``saturationdetector/{utilization,concurrency}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol, runtime_checkable

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.load import EngineReport
from kvatlas.route.parameters import GoDuration
from kvatlas.route.plugins import Services

Positive = Annotated[int, msgspec.Meta(ge=1)]
Headroom = Annotated[float, msgspec.Meta(ge=0)]


@runtime_checkable
class SaturationDetector(Protocol):
    """Says how busy candidates are, all together."""

    def saturation(self, candidates: Sequence[Candidate], now_s: float) -> float:
        """Return 0 where they are idle, 1 and more where nothing should be sent to them. No candidates at all: 1."""
        ...


class Lag(msgspec.Struct, frozen=True):
    """What a detector can't know yet."""

    seen_s: float
    """Requests sent at this time or later may be missing from what it says."""
    per_request: float
    """How much one of them may add to its endpoint."""


@runtime_checkable
class LaggingDetector(Protocol):
    """A detector that goes by reports, which come later than requests are sent."""

    def lag(self, candidates: Sequence[Candidate], now_s: float) -> Lag | None:
        """Return how far its knowledge reaches; None where it has none."""
        ...


class UtilizationDetector:
    """The mean over endpoints of the scarcer of queue and KV cache: max(waiting / threshold, usage / threshold).

    An endpoint that does not say, or has not said for too long, counts as 1: a fleet whose metrics can't be read takes nothing.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        """``headroom``: by how much of a threshold one endpoint may be over it before the filter leaves it out."""

        queue_depth_threshold: Positive = 5
        kv_cache_util_threshold: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
        metrics_staleness_threshold: GoDuration = GoDuration(0.2)
        headroom: Headroom = 0.0

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self.name = name
        self._parameters = parameters
        self._age_s_max = parameters.metrics_staleness_threshold
        if not self._age_s_max:
            raise ConfigError(
                f"{name}.metricsStalenessThreshold", "is zero: every report is older", 'a duration such as "200ms"'
            )

    def saturation(self, candidates: Sequence[Candidate], now_s: float) -> float:
        if not candidates:
            return 1.0
        return sum(self._of(candidate, now_s) for candidate in candidates) / len(candidates)

    def stale(self, candidates: Sequence[Candidate], now_s: float) -> int:
        """Return how many endpoints count as 1 for lack of a report."""
        return sum(self._report(candidate, now_s) is None for candidate in candidates)

    def lag(self, candidates: Sequence[Candidate], now_s: float) -> Lag | None:
        """Return up to when all reports reach; a request may be one more in its endpoint's queue."""
        reports = [report for candidate in candidates if (report := self._report(candidate, now_s)) is not None]
        if not reports:
            return None
        return Lag(min(report.at_s for report in reports), 1.0 / self._parameters.queue_depth_threshold)

    def filter(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Leave out who is over a threshold with its headroom, or has not reported; where that is everybody, nobody."""
        share = 1.0 + self._parameters.headroom
        waiting_max = self._parameters.queue_depth_threshold * share
        usage_max = self._parameters.kv_cache_util_threshold * share
        kept = []
        for candidate in candidates:
            report = self._report(candidate, cycle.now_s)
            if report is not None and report.waiting < waiting_max and report.kv_usage < usage_max:
                kept.append(candidate)
        return kept or candidates

    def _report(self, candidate: Candidate, now_s: float) -> EngineReport | None:
        return candidate.load.report_within(now_s, self._age_s_max)

    def _of(self, candidate: Candidate, now_s: float) -> float:
        report = self._report(candidate, now_s)
        if report is None:
            return 1.0
        queue = report.waiting / self._parameters.queue_depth_threshold
        return max(queue, report.kv_usage / self._parameters.kv_cache_util_threshold)


class ConcurrencyDetector:
    """What is in flight from here over what may be: known at once, but blind to what others send and to the KV cache.

    ``hybrid`` takes the scarcer of requests and tokens of each endpoint, then the mean; the others take sums.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        """Limits are those of one endpoint. ``inFlightLoadProducerName`` has no effect: counts are the router's own."""

        concurrency_mode: Literal["requests", "tokens", "hybrid"] = "requests"
        max_concurrency: Positive = 100
        max_token_concurrency: Positive = 1_000_000
        headroom: Headroom = 0.0
        in_flight_load_producer_name: str = ""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self.name = name
        self._parameters = parameters

    def saturation(self, candidates: Sequence[Candidate], now_s: float) -> float:
        if not candidates:
            return 1.0
        return sum(self._of(candidate) for candidate in candidates) / len(candidates)

    def filter(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Leave out who is at its limit with headroom. Where that is everybody nobody stays, and the request is refused."""
        kept = [candidate for candidate in candidates if self._admits(candidate)]
        if candidates and not kept:
            cycle.saturated = True
        return kept

    def _of(self, candidate: Candidate) -> float:
        in_flight, limits = candidate.load.in_flight, self._parameters
        requests = in_flight.requests / limits.max_concurrency
        tokens = in_flight.tokens / limits.max_token_concurrency
        return {"requests": requests, "tokens": tokens, "hybrid": max(requests, tokens)}[limits.concurrency_mode]

    def _admits(self, candidate: Candidate) -> bool:
        in_flight, limits = candidate.load.in_flight, self._parameters
        share = 1.0 + limits.headroom
        requests = in_flight.requests < int(limits.max_concurrency * share)
        tokens = in_flight.tokens < int(limits.max_token_concurrency * share)
        return {"requests": requests, "tokens": tokens, "hybrid": requests and tokens}[limits.concurrency_mode]
