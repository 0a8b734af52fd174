"""Chats: each turn's prompt is all that was said before, and users think before they go on."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from kvatlas.sim.workloads.draws import Draws
from kvatlas.sim.workloads.parameters import Count, Rate, Seconds, Spreading, Tokens
from kvatlas.sim.workloads.poisson import poisson
from kvatlas.sim.workloads.texts import Texts
from kvatlas.sim.workloads.workload import Arrival


class ChatParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lengths are log-normal around their means; the number of turns is geometric."""

    qps: Annotated[Rate, Meta(description="requests a second, once as many chats end as begin")] = 10.0
    duration_s: Annotated[Seconds, Meta(description="how long requests come; what was asked is answered")] = 600.0
    systems: Annotated[Count, Meta(description="system prompts, all equally frequent")] = 4
    system_tokens: Annotated[Tokens, Meta(description="length of a system prompt")] = 1000
    user_tokens: Annotated[Tokens, Meta(description="what a user writes in a turn")] = 200
    answer_tokens: Annotated[Tokens, Meta(description="what the model answers")] = 300
    turns: Annotated[float, Meta(ge=1, le=10_000, description="turns of a chat")] = 6.0
    think_s: Annotated[Seconds, Meta(description="from an answer to the next turn")] = 15.0
    spread: Annotated[Spreading, Meta(description="sigma of lengths; 0: all alike")] = 0.6
    context_tokens_max: Annotated[Tokens, Meta(description="a chat ends before it gets longer")] = 32_000


class Chats:
    """A closed loop: a turn waits for the answer before it. Nothing is kept of a chat: its place is its length."""

    name = "chats"

    def __init__(self, parameters: ChatParameters, seed: int, scale: float) -> None:
        self._is = parameters
        self._seed = seed
        self._scale = scale
        self._duration_s = parameters.duration_s / scale
        self._texts = Texts()
        self._systems = [self._texts.new(parameters.system_tokens) for _ in range(parameters.systems)]

    def arrivals(self) -> Iterator[Arrival]:
        chats_per_s = self._is.qps / self._is.turns * self._scale
        begins = poisson(Draws(self._seed, 0), chats_per_s, 0.0, self._duration_s)
        for session, at_s in enumerate(begins):
            draws = Draws(self._seed, 1, session)
            yield self._turn(at_s, session, self._systems[draws.below(self._is.systems)], draws)

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        assert answered.session is not None
        draws = Draws(self._seed, 2, answered.session, len(answered.tokens))
        if draws.uniform() * self._is.turns < 1:
            return None
        at_s += draws.waiting(self._is.think_s)
        if at_s > self._duration_s:
            return None
        turn = self._turn(at_s, answered.session, answered.tokens, draws)
        return turn if len(turn.tokens) <= self._is.context_tokens_max else None

    def _turn(self, at_s: float, session: int, said: array[int], draws: Draws) -> Arrival:
        prompt = said + self._texts.new(draws.length(self._is.user_tokens, self._is.spread))
        answer = self._texts.new(draws.length(self._is.answer_tokens, self._is.spread))
        return Arrival(at_s, prompt + answer, len(prompt), session=session)
