"""Requests that share nothing: what a policy costs where there is nothing to win but balance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from kvatlas.sim.workloads.draws import Draws
from kvatlas.sim.workloads.parameters import Rate, Seconds, Spreading, Tokens
from kvatlas.sim.workloads.poisson import poisson
from kvatlas.sim.workloads.texts import Texts
from kvatlas.sim.workloads.workload import Arrival


class NoReuseParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lengths are log-normal around their means."""

    qps: Annotated[Rate, Meta(description="requests a second")] = 10.0
    duration_s: Annotated[Seconds, Meta(description="how long requests come")] = 300.0
    prompt_tokens: Annotated[Tokens, Meta(description="length of a prompt")] = 2000
    answer_tokens: Annotated[Tokens, Meta(description="what the model answers")] = 200
    spread: Annotated[Spreading, Meta(description="sigma of lengths; 0: all alike")] = 0.8


class NoReuse:
    """A Poisson process of new texts."""

    name = "no-reuse"

    def __init__(self, parameters: NoReuseParameters, seed: int, scale: float) -> None:
        self._is = parameters
        self._seed = seed
        self._scale = scale
        self._texts = Texts()

    def arrivals(self) -> Iterator[Arrival]:
        draws = Draws(self._seed, 0)
        duration_s = self._is.duration_s / self._scale
        for at_s in poisson(Draws(self._seed, 1), self._is.qps * self._scale, 0.0, duration_s):
            prompt = self._texts.new(draws.length(self._is.prompt_tokens, self._is.spread))
            answer = self._texts.new(draws.length(self._is.answer_tokens, self._is.spread))
            yield Arrival(at_s, prompt + answer, len(prompt))

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        return None
