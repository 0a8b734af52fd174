"""What is learnt from how requests went: costs of the fleet, traits of every endpoint. No IO, no clock.

Figures move by the logarithm of observed over expected, so that they stay positive and twice too much weighs as much as half;
one observation counts for a factor of four at most, so that an outlier moves little and a slow engine is still found within
ten requests.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import msgspec

from kvatlas.route.load import EngineReport
from kvatlas.route.matches import MatchSource
from kvatlas.route.ttft.model import Costs, Traits

SURPRISE_MAX = math.log(4)
"""What one observation may say, as a logarithm."""
FIRST_SAMPLES = 8
"""Until then the fleet's costs are guesses, and an observation may say anything."""
COSTS_MEMORY = 64
"""Observations over which the fleet's costs are averaged."""
TRAITS_MEMORY = 10
"""The same of an endpoint's slowness and trust."""
ARRIVALS_MEMORY = 256
"""Requests over which their rate is averaged."""
TRUST_PRIOR = 4.0
"""As how many observations the fleet's trust counts at an endpoint."""
STUCK_REPORTS = 3
"""An engine that says so often that requests wait while equally many run has no more slots than these."""


class Sample(msgspec.Struct, frozen=True):
    """One request that got its first token."""

    ttft_s: float
    other_s: float
    """Of these, what was expected for other reasons than computing prompts."""
    requests: float
    """Prompts until then: those ahead and its own."""
    tokens: float
    """Computed until then, as far as is known."""


class _Trust:
    """Share of predicted cached tokens that were cached: a mean over the last observations, around a prior."""

    __slots__ = ("kept", "weight")

    def __init__(self) -> None:
        self.kept = self.weight = 0.0

    def learn(self, share: float, weight: float, memory: int) -> None:
        fade = 1 - 1 / memory
        self.kept = self.kept * fade + share * weight
        self.weight = self.weight * fade + weight

    def value(self, prior: float) -> float:
        return (self.kept + prior * TRUST_PRIOR) / (self.weight + TRUST_PRIOR)


class _Endpoint:
    __slots__ = ("learnt_at", "log_slowness", "report", "samples", "slots", "stuck", "trust", "weight")

    def __init__(self, log_slowness: float) -> None:
        self.log_slowness = log_slowness
        self.samples = 0
        self.weight = 0.0
        """Samples that still count: fewer the longer ago they are."""
        self.learnt_at = 0
        self.trust = {source: _Trust() for source in MatchSource}
        self.report: EngineReport | None = None
        self.stuck = 0
        self.slots: int | None = None


class Learner:
    """Knows costs and traits; endpoints that nothing is known of have those of the fleet."""

    def __init__(self) -> None:
        self.costs = Costs()
        self.surprise = 0.1
        """Mean absolute logarithm of observed over expected: how wrong expectations are."""
        self._samples = 0
        self._arrivals: deque[tuple[float, str]] = deque()
        self._arrived: Counter[str] = Counter()
        self._endpoints: dict[str, _Endpoint] = {}
        self._trust = {source: _Trust() for source in MatchSource}
        self._traits: dict[str, Traits] = {}
        self._typical: Traits | None = None

    def knows(self, endpoint: str) -> bool:
        """Say whether an endpoint was asked for and is not forgotten."""
        return endpoint in self._endpoints

    def traits(self, endpoint: str) -> Traits:
        """Return what is known of an endpoint."""
        found = self._traits.get(endpoint)
        if found is None:
            found = self._traits[endpoint] = self._made(self._endpoint(endpoint))
        return found

    def typical(self) -> Traits:
        """Return what is to be expected of an endpoint that nothing is known of."""
        if self._typical is None:
            known = [one.log_slowness for one in self._endpoints.values() if one.samples]
            trust = {source: one.value(1.0) for source, one in self._trust.items()}
            self._typical = Traits(math.exp(median(known)) if known else 1.0, trust)
        return self._typical

    def arrived(self, endpoint: str, now_s: float) -> None:
        """Learn how often requests arrive, and where."""
        if len(self._arrivals) == ARRIVALS_MEMORY:
            _, before = self._arrivals.popleft()
            self._arrived[before] -= 1
            if not self._arrived[before]:
                del self._arrived[before]
        self._arrivals.append((now_s, endpoint))
        self._arrived[endpoint] += 1

    def arrivals_per_s(self, endpoints: Sequence[str]) -> list[float]:
        """Return how many requests each endpoint gets a second: half what it got, half what everybody got on average."""
        took_s = self._arrivals[-1][0] - self._arrivals[0][0] if self._arrivals else 0.0
        if took_s <= 0:
            return [0.0] * len(endpoints)
        average = len(self._arrivals) / max(1, len(self._endpoints))
        arrived = self._arrived
        return [(arrived.get(endpoint, 0) + average) / 2 / took_s for endpoint in endpoints]

    def keep(self, endpoints: Iterable[str]) -> None:
        """Forget all endpoints but these."""
        kept = set(endpoints)
        for gone in self._endpoints.keys() - kept:
            del self._endpoints[gone]
        self._traits.clear()
        self._typical = None

    def ttft(self, endpoint: str, sample: Sample) -> None:
        """Learn from a first token. The endpoint learns at once, the fleet's costs slowly."""
        one, costs = self._endpoint(endpoint), self.costs
        observed_s = max(sample.ttft_s - sample.other_s, 0.1 * sample.ttft_s, 1e-4)
        slowness = math.exp(one.log_slowness)
        requests_s, tokens_s = costs.request_s * sample.requests, costs.token_s * sample.tokens
        error = math.log(observed_s / (slowness * (requests_s + tokens_s)))
        if self._samples >= FIRST_SAMPLES:
            error = max(-SURPRISE_MAX, min(SURPRISE_MAX, error))
        self.surprise += (abs(error) - self.surprise) / COSTS_MEMORY
        share = requests_s / (requests_s + tokens_s)
        by_request, by_token = share, 1 - share  # the gradient: what took most of the time is blamed most
        if self._samples < FIRST_SAMPLES:
            by_request = by_token = 1.0  # first the scale, then the proportions
        step = error * max(1 / (1 + self._samples), 1 / COSTS_MEMORY) / (by_request * share + by_token * (1 - share))
        self.costs = msgspec.structs.replace(
            costs,
            request_s=costs.request_s * math.exp(step * by_request),
            token_s=costs.token_s * math.exp(step * by_token),
        )
        self._samples += 1
        one.weight *= math.exp(-(self._samples - one.learnt_at) / (TRAITS_MEMORY * max(1, len(self._endpoints))))
        one.log_slowness += (error if self._samples > 1 else 0.0) / (2 + one.weight)
        one.weight += 1
        one.samples += 1
        one.learnt_at = self._samples
        self._changed(endpoint)

    def request(self, uncached_tokens: float, decode_s: float | None) -> None:
        """Learn what requests are like."""
        costs = self.costs
        uncached = costs.uncached_tokens + (uncached_tokens - costs.uncached_tokens) / COSTS_MEMORY
        occupied = costs.decode_s if decode_s is None else costs.decode_s + (decode_s - costs.decode_s) / COSTS_MEMORY
        self.costs = msgspec.structs.replace(costs, uncached_tokens=max(1.0, uncached), decode_s=occupied)

    def cached(self, endpoint: str, source: MatchSource, predicted: int, actual: int, prompt_tokens: int) -> None:
        """Learn how much of what was predicted to be cached was."""
        share, weight = min(1.0, actual / predicted), min(1.0, predicted / prompt_tokens)
        self._endpoint(endpoint).trust[source].learn(share, weight, TRAITS_MEMORY)
        self._trust[source].learn(share, weight, COSTS_MEMORY)
        self._changed(endpoint)

    def report(self, endpoint: str, report: EngineReport) -> None:
        """Learn how many slots an engine has, from its saying that requests wait while always equally many run."""
        one = self._endpoint(endpoint)
        if one.report is not None and report.at_s <= one.report.at_s:
            return
        before, one.report = one.report, report
        if one.slots is not None and report.running > one.slots:
            one.slots = None
            self._traits.pop(endpoint, None)
        waits = report.waiting > 0 and before is not None and before.waiting > 0
        one.stuck = one.stuck + 1 if waits and before is not None and before.running == report.running else 0
        if one.stuck >= STUCK_REPORTS and one.slots != report.running:
            one.slots = max(1, report.running)
            self._traits.pop(endpoint, None)

    def _endpoint(self, endpoint: str) -> _Endpoint:
        one = self._endpoints.get(endpoint)
        if one is None:
            one = self._endpoints[endpoint] = _Endpoint(math.log(self.typical().slowness))
        return one

    def _made(self, one: _Endpoint) -> Traits:
        typical = self.typical()
        trust: Mapping[MatchSource, float] = {source: each.value(typical.trust[source]) for source, each in one.trust.items()}
        return Traits(math.exp(one.log_slowness), trust, one.samples, one.slots)

    def _changed(self, endpoint: str) -> None:
        """What was made of it is made anew when asked for; of the others, whose prior moved a little, now and then."""
        if self._samples % COSTS_MEMORY:
            self._traits.pop(endpoint, None)
        else:
            self._traits.clear()
        self._typical = None
