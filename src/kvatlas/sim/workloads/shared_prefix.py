"""llm-d's shared-prefix benchmark: groups with a system prompt each, users with a question each, a ladder of rates.

Sources: llm-d-kv-cache, benchmarking/73-capacity/README.md, "X-70R-6kSys" (8 pods with 307,328 KV tokens each, Qwen3-32B; the
stages below are its own); kubernetes-sigs/inference-perf at 5b1da4d, ``shared_prefix`` data and the load generator: all prompts
are shuffled once, each stage begins with the first of them, and a stage begins when all requests of the one before are
answered. Its arrivals come Poisson-many a second, evenly drawn within it; here the time between two is exponential.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from kvatlas.errors import ConfigError
from kvatlas.sim.workloads.draws import Draws
from kvatlas.sim.workloads.parameters import Count, Rate, Seconds, Tokens
from kvatlas.sim.workloads.texts import Texts
from kvatlas.sim.workloads.workload import Arrival

WARM_UP = "warm-up"
LADDER = (
    "3:20 10:20 15:20 20:38 22:34 25:30 30:25 35:21 40:38 43:36 46:33 49:30 52:29 55:27 57:26 60:25"  # requests/s : seconds
)


class SharedPrefixParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As published."""

    groups: Annotated[Count, Meta(description="system prompts")] = 150
    users: Annotated[Count, Meta(description="questions that are asked behind each of them, again and again")] = 5
    system_tokens: Annotated[Tokens, Meta(description="length of a system prompt")] = 6000
    question_tokens: Annotated[Tokens, Meta(description="length of a question")] = 1200
    output_tokens: Annotated[Tokens, Meta(description="length of an answer")] = 1000
    stages: Annotated[str, Meta(description="the ladder: RATE:SECONDS for each stage, with blanks between")] = LADDER
    warm_up: Annotated[str, Meta(description="RATE:SECONDS before the first stage; empty: none")] = "15:50"
    qps: Annotated[Rate | None, Meta(description="one stage at this rate instead of the ladder")] = None
    duration_s: Annotated[Seconds, Meta(description="how long that one takes")] = 60.0
    gap_s: Annotated[Seconds, Meta(description="idle time before a stage, in which the one before is answered")] = 600.0


class Stage(msgspec.Struct, frozen=True):
    """Requests at one rate."""

    name: str
    rate_per_s: float
    duration_s: float

    @property
    def requests(self) -> int:
        return int(self.rate_per_s * self.duration_s)


class SharedPrefix:
    """Stages one after the other, each of them a phase. ``scale`` makes stages denser; the gaps between them stay."""

    name = "shared-prefix"

    def __init__(self, parameters: SharedPrefixParameters, seed: int, scale: float) -> None:
        self._is = parameters
        self._seed = seed
        self._scale = scale
        self._texts = Texts()
        self.stages = stages(parameters)

    def arrivals(self) -> Iterator[Arrival]:
        prompts = self._prompts()
        begins_s = 0.0
        for number, stage in enumerate(self.stages):
            draws = Draws(self._seed, 1, number)
            at_s = begins_s
            for request in range(stage.requests):
                at_s += draws.waiting(1 / (stage.rate_per_s * self._scale))
                prompt = prompts[request % len(prompts)]
                answer = self._texts.new(self._is.output_tokens)
                yield Arrival(at_s, prompt + answer, len(prompt), phase=stage.name)
            begins_s = max(at_s, begins_s + stage.duration_s / self._scale) + self._is.gap_s

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        return None

    def _prompts(self) -> list[array[int]]:
        """Return all prompts in the order in which each stage goes through them."""
        made = []
        for _ in range(self._is.groups):
            system = self._texts.new(self._is.system_tokens)
            made += [system + self._texts.new(self._is.question_tokens) for _ in range(self._is.users)]
        draws = Draws(self._seed, 0)
        for last in range(len(made) - 1, 0, -1):
            other = draws.below(last + 1)
            made[last], made[other] = made[other], made[last]
        return made


def stages(parameters: SharedPrefixParameters) -> list[Stage]:
    """Return the stages, the warm-up first. ConfigError for what is no stage."""
    warm_up = [_stage("warm_up", text, WARM_UP) for text in parameters.warm_up.split()]
    if parameters.qps is not None:
        return [*warm_up, Stage(f"{parameters.qps:g} QPS", parameters.qps, parameters.duration_s)]
    ladder = [_stage("stages", text) for text in parameters.stages.split()]
    if not ladder:
        raise ConfigError("stages", "is empty", "RATE:SECONDS for each stage, with blanks between, as 3:20 10:20")
    names = [stage.name for stage in ladder]
    if len(set(names)) < len(names):
        raise ConfigError("stages", "has a rate twice", "each rate once: results are told by rate")
    return [*warm_up, *ladder]


def _stage(field: str, text: str, name: str | None = None) -> Stage:
    rate, _, duration = text.partition(":")
    try:
        rate_per_s, duration_s = float(rate), float(duration)
    except ValueError:
        rate_per_s = duration_s = 0.0
    if not (0 < rate_per_s <= 1e6 and 0 < duration_s <= 1e8):
        raise ConfigError(field, f"{text!r} is no stage", "RATE:SECONDS above 0, as 3:20; several stages with blanks between")
    return Stage(name or f"{rate_per_s:g} QPS", rate_per_s, duration_s)
