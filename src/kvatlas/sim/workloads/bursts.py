"""Steady traffic, some of it popular, and bursts of one request that nobody has seen before."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from kvatlas.sim.workloads.draws import Draws
from kvatlas.sim.workloads.parameters import Count, Rate, Seconds, Spreading, Tokens
from kvatlas.sim.workloads.poisson import poisson
from kvatlas.sim.workloads.texts import Texts
from kvatlas.sim.workloads.workload import Arrival


class BurstParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The prefix of rank r is asked for with weight 1/r (Zipf)."""

    qps: Annotated[Rate, Meta(description="requests a second between bursts")] = 10.0
    duration_s: Annotated[Seconds, Meta(description="how long requests come")] = 300.0
    prefixes: Annotated[Count, Meta(description="prefixes of steady traffic; the one of rank r has weight 1/r")] = 100
    prefix_tokens: Annotated[Tokens, Meta(description="length of a prefix, a burst's too")] = 3000
    question_tokens: Annotated[Tokens, Meta(description="what is asked behind it")] = 200
    answer_tokens: Annotated[Tokens, Meta(description="what the model answers")] = 200
    burst_every_s: Annotated[float, Meta(gt=0, description="from a burst to the next, on average")] = 20.0
    burst_requests: Annotated[Count, Meta(description="equal requests of a burst, with a prefix that is new")] = 40
    burst_s: Annotated[Seconds, Meta(description="how long a burst takes; 0: all at once")] = 1.0
    spread: Annotated[Spreading, Meta(description="sigma of lengths, but of prefixes; 0: all alike")] = 0.6


class Bursts:
    """Two streams merged; both are the same whatever the other does."""

    name = "bursts"

    def __init__(self, parameters: BurstParameters, seed: int, scale: float) -> None:
        self._is = parameters
        self._seed = seed
        self._scale = scale
        self._texts = Texts()
        self._duration_s = parameters.duration_s / scale

    def arrivals(self) -> Iterator[Arrival]:
        return heapq.merge(self._steady(), self._bursts(), key=lambda arrival: arrival.at_s)

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        return None

    def _steady(self) -> Iterator[Arrival]:
        prefixes = [self._texts.new(self._is.prefix_tokens) for _ in range(self._is.prefixes)]
        weights = list(itertools.accumulate(1 / rank for rank in range(1, len(prefixes) + 1)))
        draws = Draws(self._seed, 0)
        for at_s in poisson(Draws(self._seed, 1), self._is.qps * self._scale, 0.0, self._duration_s):
            prefix = prefixes[bisect.bisect(weights, draws.uniform() * weights[-1])]
            prompt = prefix + self._texts.new(draws.length(self._is.question_tokens, self._is.spread))
            answer = self._texts.new(draws.length(self._is.answer_tokens, self._is.spread))
            yield Arrival(at_s, prompt + answer, len(prompt))

    def _bursts(self) -> Iterator[Arrival]:
        """Yield bursts one after the other: one that would begin within another begins at its end."""
        draws = Draws(self._seed, 2)
        free_s = 0.0
        for begin_s in poisson(Draws(self._seed, 3), self._scale / self._is.burst_every_s, 0.0, self._duration_s):
            begin_s = max(begin_s, free_s)  # noqa: PLW2901 - it waits for the one before
            prompt = self._texts.new(self._is.prefix_tokens) + self._texts.new(self._is.question_tokens)
            burst_s = self._is.burst_s / self._scale
            for at_s in sorted(begin_s + burst_s * draws.uniform() for _ in range(self._is.burst_requests)):
                answer = self._texts.new(draws.length(self._is.answer_tokens, self._is.spread))
                yield Arrival(at_s, prompt + answer, len(prompt))
            free_s = begin_s + burst_s
