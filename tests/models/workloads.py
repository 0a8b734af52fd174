"""Workloads made by hand, and a small engine, for tests of the simulated fleet."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence

import msgspec

from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.fleet import simulate
from kvatlas.sim.policies import PolicyMaker
from kvatlas.sim.reference import ReferenceEngines
from kvatlas.sim.results import RunResult
from kvatlas.sim.workloads.workload import Arrival, Workload

COSTS = EngineCosts(step_s=0.01, prefill_token_s=1e-4, decode_request_s=1e-4)
SMALL = EngineSpec(costs=COSTS, gpu_blocks=1_000, step_tokens_max=2_048, running_max=16)


class Given:
    """A list of arrivals; ``after``: what follows an answer."""

    name = "given"

    def __init__(
        self, arrivals: Sequence[Arrival], after: Callable[[Arrival, float], Arrival | None] = lambda answered, at_s: None
    ) -> None:
        self._arrivals = arrivals
        self._after = after

    def arrivals(self) -> Iterator[Arrival]:
        return iter(self._arrivals)

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        return self._after(answered, at_s)


def tokens(seed: object, count: int) -> array[int]:
    """Return ``count`` tokens that depend on a seed."""
    rng = random.Random(str(seed))
    return array("I", (rng.randrange(32_000) for _ in range(count)))


def arrival(at_s: float, *parts: array[int], output: int = 10, session: int | None = None) -> Arrival:
    """Return a request whose prompt consists of parts, and whose answer is like no other."""
    prompt = array("I")
    for part in parts:
        prompt += part
    answer = tokens((at_s, len(prompt), session), output)
    return Arrival(at_s, prompt + answer, len(prompt), session)


def shared_prefixes(
    seed: int, *, requests: int, per_s: float, groups: int = 6, prefix: int = 640, own: int = 96, output: int = 12
) -> Given:
    """Open loop: prompts of a few long prefixes, each with an end of its own."""
    rng = random.Random(seed)
    prefixes = [tokens(f"{seed} prefix {group}", prefix) for group in range(groups)]
    at_s, made = 0.0, []
    for number in range(requests):
        at_s += rng.expovariate(per_s)
        made.append(arrival(at_s, rng.choice(prefixes), tokens(f"{seed} own {number}", own), output=output))
    return Given(made)


def run(
    workload: Workload, policy: str | PolicyMaker = "least-load", engines: int = 3, seed: int = 1, **how: object
) -> RunResult:
    """Return what a small fleet does, on reference engines; without the time that it took."""
    specs = how.pop("specs", [SMALL] * engines)
    result = simulate(workload, policy, specs, seed=seed, engines=ReferenceEngines(), **how)  # type: ignore[arg-type]
    assert result.wall_s > 0
    return msgspec.structs.replace(result, wall_s=0.0)
