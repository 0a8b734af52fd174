"""Agents: a long prompt of tools that all share, many fast turns, and tasks that fan out."""

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


class AgentParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lengths are log-normal around their means; the number of turns is geometric."""

    qps: Annotated[Rate, Meta(description="requests a second, once as many tasks end as begin")] = 10.0
    duration_s: Annotated[Seconds, Meta(description="how long requests come; what was asked is answered")] = 600.0
    agents: Annotated[Count, Meta(description="kinds of agents, each with tools of its own, all equally frequent")] = 4
    tools_tokens: Annotated[Tokens, Meta(description="the prompt of an agent's tools")] = 8000
    task_tokens: Annotated[Tokens, Meta(description="a task, which its branches share")] = 1500
    branches: Annotated[Count, Meta(description="branches of a task, which begin at once and go on by themselves")] = 3
    branch_tokens: Annotated[Tokens, Meta(description="what a branch is told")] = 100
    result_tokens: Annotated[Tokens, Meta(description="a tool's result, which the next turn begins with")] = 500
    answer_tokens: Annotated[Tokens, Meta(description="what the model answers: a call of a tool")] = 120
    turns: Annotated[float, Meta(ge=1, le=10_000, description="turns of a branch")] = 12.0
    tool_s: Annotated[Seconds, Meta(description="how long a tool takes")] = 1.0
    spread: Annotated[Spreading, Meta(description="sigma of lengths; 0: all alike")] = 0.6
    context_tokens_max: Annotated[Tokens, Meta(description="a branch ends before it gets longer")] = 64_000


class Agents:
    """A closed loop: a turn waits for the answer before it. Nothing is kept of a branch: its place is its length."""

    name = "agents"

    def __init__(self, parameters: AgentParameters, seed: int, scale: float) -> None:
        self._is = parameters
        self._seed = seed
        self._scale = scale
        self._duration_s = parameters.duration_s / scale
        self._texts = Texts()
        self._tools = [self._texts.new(parameters.tools_tokens) for _ in range(parameters.agents)]

    def arrivals(self) -> Iterator[Arrival]:
        tasks_per_s = self._is.qps / (self._is.turns * self._is.branches) * self._scale
        begins = poisson(Draws(self._seed, 0), tasks_per_s, 0.0, self._duration_s)
        for task, at_s in enumerate(begins):
            draws = Draws(self._seed, 1, task)
            tools = self._tools[draws.below(self._is.agents)]
            asked = tools + self._texts.new(draws.length(self._is.task_tokens, self._is.spread))
            for branch in range(self._is.branches):
                session = task * self._is.branches + branch
                yield self._turn(at_s, session, asked, self._is.branch_tokens, draws)

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        assert answered.session is not None
        draws = Draws(self._seed, 2, answered.session, len(answered.tokens))
        if draws.uniform() * self._is.turns < 1:
            return None
        at_s += draws.waiting(self._is.tool_s)
        if at_s > self._duration_s:
            return None
        turn = self._turn(at_s, answered.session, answered.tokens, self._is.result_tokens, draws)
        return turn if len(turn.tokens) <= self._is.context_tokens_max else None

    def _turn(self, at_s: float, session: int, before: array[int], new_tokens: float, draws: Draws) -> Arrival:
        prompt = before + self._texts.new(draws.length(new_tokens, self._is.spread))
        answer = self._texts.new(draws.length(self._is.answer_tokens, self._is.spread))
        return Arrival(at_s, prompt + answer, len(prompt), session=session)
