"""``latency-scorer``: who is predicted to meet the request's latency objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.plugins import Services
from kvatlas.route.scorers.load import waiting
from kvatlas.route.scorers.prefix import match_producer, shares_held

Weight = Annotated[float, msgspec.Meta(ge=0)]
STEPS = 100
"""Scores are hundredths, so that near-ties are ties, and spread."""
EPSILON_MS = 1e-9


class Headroom(msgspec.Struct, frozen=True):
    """How far an endpoint is predicted to stay below the objectives; negative: how far above. No objective counts as 0 ms."""

    position: int
    """In the list of candidates."""
    ttft_ms: float
    tpot_ms: float
    idle: bool
    """Nothing from here is in flight there."""

    @property
    def severity(self) -> int:
        """0: meets both; 1: misses the time per token; 2: misses the time to the first one; 3: misses both."""
        return 2 * (self.ttft_ms < 0) + (self.tpot_ms < 0)


class LatencyScorer:
    """Rates by the headroom between prediction and objective; without predictions by a mean of three simpler scores.

    Those that meet both objectives are rated, the others get 0. Where nobody meets them, the idle are rated; where nobody is
    idle either, those that miss the least severe one. Among the rated, headrooms are scaled to 0 to 1 and mixed by the weights;
    ``least`` prefers little headroom (which packs), ``most`` much. Of those that miss, who misses by least is preferred.

    Without a prediction for every candidate: the weighted mean of free KV cache, queue against the longest one, and share of
    the prompt that is held. What is not reported counts as idle, as in the scorers of load. Source: llm-d-router,
    latency-scorer (but there a candidate without prediction counts as one that meets both, and so draws every request).
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        ttft_weight: Weight = 0.8
        tpot_weight: Weight = 0.2
        """Both 0: time to the first token alone."""
        headroom_selection_strategy: Literal["least", "most"] = "least"
        composite_kv_weight: Weight = msgspec.field(default=1.0, name="compositeKVWeight")
        composite_queue_weight: Weight = 1.0
        composite_prefix_weight: Weight = 1.0
        """All three 0: free KV cache alone."""
        latency_prediction_info_producer_name: str = ""
        prefix_match_info_producer_name: str = ""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        """Raises ConfigError where the producer of matches is none."""
        self.name = name
        self._weights = _normalized(parameters.ttft_weight, parameters.tpot_weight)
        self._most = parameters.headroom_selection_strategy == "most"
        self._composite = _normalized(
            parameters.composite_kv_weight, parameters.composite_queue_weight, parameters.composite_prefix_weight
        )
        self._latency_producer = parameters.latency_prediction_info_producer_name or None
        self._match_producer = match_producer(name, parameters.prefix_match_info_producer_name, services)

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        headrooms = self._headrooms(cycle, candidates)
        if headrooms is None:
            return self._composite_scores(cycle, candidates)
        scores = [0.0] * len(candidates)
        rated = _rated(headrooms)
        combined = _combined(rated, *self._weights)
        prefer_much = self._most and rated[0].severity == 0
        for headroom, share in zip(rated, combined, strict=True):
            step = int((share if prefer_much else 1.0 - share) * STEPS) + 1
            scores[headroom.position] = min(step, STEPS) / STEPS
        return scores

    def _headrooms(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[Headroom] | None:
        """Return every candidate's headroom; None where one has no prediction."""
        predictions = cycle.latencies_of(self._latency_producer)
        if predictions is None:
            return None
        ttft_slo_s, tpot_slo_s = cycle.request.ttft_slo_s or 0.0, cycle.request.tpot_slo_s or 0.0
        headrooms = []
        for position, one in enumerate(candidates):
            predicted = predictions.get(one.endpoint.name)
            if predicted is None:
                return None
            ttft_ms = (ttft_slo_s - predicted.ttft_s) * 1000
            tpot_ms = (tpot_slo_s - predicted.tpot_s) * 1000
            headrooms.append(Headroom(position, ttft_ms, tpot_ms, one.load.in_flight.requests == 0))
        return headrooms

    def _composite_scores(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        kv_weight, queue_weight, prefix_weight = self._composite
        queues = waiting(candidates)
        longest = max(queues) or 1  # all queues empty: all are as good as can be
        shares = shares_held(cycle.matches_of(self._match_producer), candidates)
        scores = []
        for one, queue, share in zip(candidates, queues, shares, strict=True):
            report = one.load.report
            free = 1.0 if report is None else 1.0 - report.kv_usage
            composite = kv_weight * free + queue_weight * (1.0 - queue / longest) + prefix_weight * share
            scores.append(math.floor(composite * STEPS + 0.5) / STEPS)
        return scores


def _rated(headrooms: list[Headroom]) -> list[Headroom]:
    """Return those that get a score: the best group of which there is one."""
    good = [one for one in headrooms if one.severity == 0]
    if good:
        return good
    idle = [one for one in headrooms if one.idle]
    if idle:
        return idle
    least = min(one.severity for one in headrooms)
    return [one for one in headrooms if one.severity == least]


def _combined(rated: list[Headroom], ttft_weight: float, tpot_weight: float) -> list[float]:
    """Return each one's distance from the objectives, 0 to 1 among them; a dimension in which all are equal has no say."""
    ttft = [abs(one.ttft_ms) for one in rated]
    tpot = [abs(one.tpot_ms) for one in rated]
    ttft_span, tpot_span = max(ttft) - min(ttft), max(tpot) - min(tpot)
    if ttft_span <= EPSILON_MS < tpot_span:
        ttft_weight, tpot_weight = 0.0, 1.0
    elif tpot_span <= EPSILON_MS < ttft_span:
        ttft_weight, tpot_weight = 1.0, 0.0
    shares = zip(_scaled(ttft, ttft_span), _scaled(tpot, tpot_span), strict=True)
    return [ttft_weight * of_ttft + tpot_weight * of_tpot for of_ttft, of_tpot in shares]


def _scaled(values: list[float], span: float) -> list[float]:
    least = min(values)
    return [(value - least) / span for value in values] if span > EPSILON_MS else [0.5] * len(values)


def _normalized(*weights: float) -> tuple[float, ...]:
    """Return weights that add up to 1; the first one is all where all are 0."""
    total = sum(weights)
    return tuple(weight / total for weight in weights) if total > 0 else (1.0, *[0.0] * (len(weights) - 1))
