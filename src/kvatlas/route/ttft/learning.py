"""What is learnt from how requests went: costs of the fleet, traits of every endpoint. No IO, no clock.

Figures move by the logarithm of observed over expected, so that twice too much weighs as much as half; one observation
counts for a factor of four at most, so that an outlier moves little and a slow engine is still found within twenty requests.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import msgspec

from kvatlas.route.load import EngineReport
from kvatlas.route.matches import MatchSource
from kvatlas.route.ttft.fit import SURPRISE_MAX, Fit
from kvatlas.route.ttft.model import Costs, Traits
from kvatlas.route.ttft.pace import Pace
from kvatlas.route.ttft.slots import Slots

FIRST_SAMPLES = 8
"""Until then the fleet's costs are guesses, and an observation may say anything."""
COSTS_MEMORY = 64
"""Observations over which the fleet's costs are averaged."""
TRAITS_MEMORY = 10
"""The same of an endpoint's slowness and trust."""
ARRIVALS_MEMORY = 256
"""Requests over which their rate is averaged."""
BUSY_MAX = 0.8
"""Share of time that an endpoint is taken to be busy at most."""
TRUST_PRIOR = 4.0
"""As how many observations the fleet's trust counts at an endpoint."""
QUEUE_HALVES = 4
"""Prompts ahead with which an observation says half as much of its endpoint's slowness: what kinds of prompts are ahead decides
then, and an engine that gets the long ones, whose tokens take longer, would look slow."""
FOLLOWERS_MAX = 32.0
"""Where hardly anything is computed, a prompt counts as so many more."""
CHANCE = 1.5
"""Standard errors that may be chance: an endpoint's slowness that differs by less is taken to be the fleet's."""
SIGMA = 1.25
"""From a mean absolute error to a standard deviation, where errors are normal."""


class Sample(msgspec.Struct, frozen=True):
    """One request that got its first token."""

    ttft_s: float
    other_s: float
    """Of these, what was expected for other reasons than computing prompts."""
    requests: float
    """Prompts until then: those ahead and its own."""
    tokens: float
    """Computed until then, as far as is known."""
    pairs: float
    """Of tokens, between which attention was computed until then."""

    @property
    def amounts(self) -> tuple[float, float, float]:
        """What the time goes by, in the order of the fleet's figures."""
        return self.requests, self.tokens, self.pairs


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
    __slots__ = ("learnt_at", "log_mean", "log_slowness", "samples", "slots", "trust", "weight")

    def __init__(self, log_slowness: float) -> None:
        self.log_mean = self.log_slowness = log_slowness
        """As it was observed, a mean over the last samples; and what is believed of it."""
        self.samples = 0
        self.weight = 0.0
        """Samples that still count: fewer the longer ago they are."""
        self.learnt_at = 0
        self.trust = {source: _Trust() for source in MatchSource}
        self.slots = Slots()


class Learner:
    """Knows costs and traits; endpoints that nothing is known of have those of the fleet."""

    def __init__(self) -> None:
        self.costs = Costs()
        self._fit = Fit((self.costs.request_s, self.costs.token_s, self.costs.pair_s))
        self._pace = Pace()
        self._prompt_tokens = self.costs.uncached_tokens
        self.surprise = 0.1
        """Mean absolute logarithm of observed over expected: how wrong expectations are."""
        self._noise = 0.1
        """The same, where an endpoint's own mean had been expected."""
        self._samples = 0
        self._arrivals: deque[tuple[float, str, int]] = deque()
        self._arrived: Counter[str] = Counter()
        self._work_us: Counter[str] = Counter()
        self._all_work_us = 0
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

    def arrived(self, endpoint: str, now_s: float, work_s: float) -> None:
        """Learn how often requests arrive, and where, and how long each keeps the endpoint busy."""
        work_us = round(work_s * 1e6)
        if len(self._arrivals) == ARRIVALS_MEMORY:
            _, before, before_us = self._arrivals.popleft()
            self._arrived[before] -= 1
            self._work_us[before] -= before_us
            self._all_work_us -= before_us
            if not self._arrived[before]:
                del self._arrived[before], self._work_us[before]
        self._arrivals.append((now_s, endpoint, work_us))
        self._arrived[endpoint] += 1
        self._work_us[endpoint] += work_us
        self._all_work_us += work_us

    def behind_per_s(self, endpoints: Sequence[str]) -> list[float]:
        """Return how many requests a second of queue finds behind it, until the queue is empty again.

        That is how many arrive there a second, over the share of time in which there is nothing to do: a queue lasts longer
        than its work, since requests go on arriving. Of both half is the endpoint's own, half the average.
        """
        took_s = self._arrivals[-1][0] - self._arrivals[0][0] if self._arrivals else 0.0
        if took_s <= 0:
            return [0.0] * len(endpoints)
        count, arrived, work_us = max(1, len(self._endpoints)), self._arrived, self._work_us
        average, average_us = len(self._arrivals) / count, self._all_work_us / count
        half, half_us = 0.5 / took_s, 0.5e-6 / took_s
        return [
            half * (arrived.get(one, 0) + average) / (1 - min(half_us * (work_us.get(one, 0) + average_us), BUSY_MAX))
            for one in endpoints
        ]

    def keep(self, endpoints: Iterable[str]) -> None:
        """Forget all endpoints but these."""
        kept = set(endpoints)
        for gone in self._endpoints.keys() - kept:
            del self._endpoints[gone]
        self._traits.clear()
        self._typical = None

    def ttft(self, endpoint: str, sample: Sample) -> None:
        """Learn from a first token. The endpoint learns at once, the fleet's costs slowly."""
        one = self._endpoint(endpoint)
        observed_s = max(sample.ttft_s - sample.other_s, 0.1 * sample.ttft_s, 1e-4)
        error = math.log(observed_s / self._fit.of(sample.amounts)) - one.log_slowness
        if self._samples >= FIRST_SAMPLES:
            error = max(-SURPRISE_MAX, min(SURPRISE_MAX, error))
        self._samples += 1
        self.surprise += (abs(error) - self.surprise) / COSTS_MEMORY
        self._learn_costs(sample, error)
        weight = QUEUE_HALVES / (QUEUE_HALVES + sample.requests - 1)
        self._learn_slowness(one, error if self._samples > 1 else 0.0, weight)
        self._changed(endpoint)

    def _learn_costs(self, sample: Sample, error: float) -> None:
        if self._samples <= FIRST_SAMPLES:  # first the scale, then the proportions
            scale = error / self._samples
            self._fit.scale(math.exp(scale))
            error -= scale
        self._fit.learn(sample.amounts, error, COSTS_MEMORY)
        request_s, token_s, pair_s = self._fit.figures
        self.costs = msgspec.structs.replace(self.costs, request_s=request_s, token_s=token_s, pair_s=pair_s)

    def _learn_slowness(self, one: _Endpoint, error: float, weight: float) -> None:
        one.weight *= math.exp(-(self._samples - one.learnt_at) / (TRAITS_MEMORY * max(1, len(self._endpoints))))
        off = one.log_slowness - one.log_mean + error
        if one.weight >= 1:
            self._noise += (min(abs(off), SURPRISE_MAX) - self._noise) / COSTS_MEMORY
        one.log_mean += off * weight / (1 + weight + one.weight)
        one.weight += weight
        one.samples += 1
        one.learnt_at = self._samples
        typical, chance = math.log(self.typical().slowness), CHANCE * SIGMA * self._noise / math.sqrt(one.weight)
        one.log_slowness = typical + _beyond_chance(one.log_mean - typical, chance)

    def request(self, uncached_tokens: float, prompt_tokens: float, decode_s: float | None) -> None:
        """Learn what requests are like."""
        self._prompt_tokens += (prompt_tokens - self._prompt_tokens) / COSTS_MEMORY
        costs = self.costs
        uncached = costs.uncached_tokens + (uncached_tokens - costs.uncached_tokens) / COSTS_MEMORY
        occupied = costs.decode_s if decode_s is None else costs.decode_s + (decode_s - costs.decode_s) / COSTS_MEMORY
        uncached = max(1.0, uncached)
        followers = min(max(0.0, self._prompt_tokens / uncached - 1), FOLLOWERS_MAX)
        self.costs = msgspec.structs.replace(costs, uncached_tokens=uncached, decode_s=occupied, followers=followers)

    def answer(self, together: float, tokens: int, took_s: float) -> None:
        """Learn how answers delay each other. The values are those of :meth:`Pace.learn`."""
        self._pace.learn(together, tokens, took_s)
        self.costs = msgspec.structs.replace(self.costs, crowd_s=self._pace.crowd_s)

    def cached(self, endpoint: str, source: MatchSource, predicted: int, actual: int, prompt_tokens: int) -> None:
        """Learn how much of what was predicted to be cached was."""
        share, weight = min(1.0, actual / predicted), min(1.0, predicted / prompt_tokens)
        self._endpoint(endpoint).trust[source].learn(share, weight, TRAITS_MEMORY)
        self._trust[source].learn(share, weight, COSTS_MEMORY)
        self._changed(endpoint)

    def report(self, endpoint: str, report: EngineReport) -> None:
        """Learn how many slots an engine has."""
        slots = self._endpoint(endpoint).slots
        if slots.last is not report and slots.learn(report):
            self._traits.pop(endpoint, None)

    def _endpoint(self, endpoint: str) -> _Endpoint:
        one = self._endpoints.get(endpoint)
        if one is None:
            one = self._endpoints[endpoint] = _Endpoint(math.log(self.typical().slowness))
        return one

    def _made(self, one: _Endpoint) -> Traits:
        typical = self.typical()
        trust: Mapping[MatchSource, float] = {source: each.value(typical.trust[source]) for source, each in one.trust.items()}
        return Traits(math.exp(one.log_slowness), trust, one.samples, one.slots.limit)

    def _changed(self, endpoint: str) -> None:
        """What was made of it is made anew when asked for; of the others, whose prior moved a little, now and then."""
        if self._samples % COSTS_MEMORY:
            self._traits.pop(endpoint, None)
        else:
            self._traits.clear()
        self._typical = None


def _beyond_chance(mean: float, chance: float) -> float:
    """Return a mean as far as it is no chance: nearly all of it with much evidence, nothing within ``chance`` of 0."""
    return 0.0 if abs(mean) <= chance else mean * (1 - (chance / mean) ** 2)
