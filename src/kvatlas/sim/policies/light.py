"""Policies that know nothing of prompts: how many requests are in flight, at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvatlas.indexer import Indexer
from kvatlas.route.outcome import End
from kvatlas.sim.engines import EngineSpec, EngineState
from kvatlas.sim.policies.policy import Surroundings
from kvatlas.sim.request import Request


class InFlight:
    """Counts requests in flight, by engine: a policy but for its choice."""

    name = "in-flight"
    hears_reports = False
    indexer: Indexer | None = None

    def __init__(self, surroundings: Surroundings) -> None:
        self.random = surroundings.random
        self.engines: list[int] = []
        self.loads: dict[int, int] = {}
        """Requests in flight."""

    @property
    def notes(self) -> Sequence[str]:
        return ()

    def joins(self, engine: int, spec: EngineSpec) -> None:
        self.engines.append(engine)
        self.loads[engine] = 0

    def leaves(self, engine: int) -> None:
        self.engines.remove(engine)
        del self.loads[engine]

    def reports(self, states: Mapping[int, EngineState], at_s: float) -> None:
        pass

    def choose(self, request: Request) -> int:
        engine = self.pick(request)
        self.loads[engine] += 1
        return engine

    def pick(self, request: Request) -> int:
        raise NotImplementedError

    def first_token(self, request: Request, at_s: float) -> None:
        pass

    def ended(self, request: Request, at_s: float, end: End) -> None:
        self.loads[request.engine] -= 1


class Random(InFlight):
    """Anyone, each as likely."""

    name = "random"

    def pick(self, request: Request) -> int:
        engines = self.engines
        return engines[int(self.random.random() * len(engines))]


class RoundRobin(InFlight):
    """One after the other."""

    name = "round-robin"

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self._turn = -1

    def pick(self, request: Request) -> int:
        self._turn = (self._turn + 1) % len(self.engines)
        return self.engines[self._turn]


class LeastLoad(InFlight):
    """Who has the fewest requests in flight; of several, anyone. Known as least connections (nginx ``least_conn``)."""

    name = "least-load"

    def pick(self, request: Request) -> int:
        loads = self.loads
        least = min(loads.values())
        best = [engine for engine, load in loads.items() if load == least]
        return best[0] if len(best) == 1 else best[int(self.random.random() * len(best))]


class PowerOfTwo(InFlight):
    """Of two that are drawn, the one with fewer requests in flight; the first where both have as many.

    Source: sgl-project/sglang, sgl-model-gateway/src/policies/power_of_two.rs (61c660a).
    """

    name = "power-of-two"

    def pick(self, request: Request) -> int:
        engines, count = self.engines, len(self.engines)
        first = int(self.random.random() * count)
        if count == 1:
            return engines[0]
        second = int(self.random.random() * (count - 1))
        second += second >= first
        one, other = engines[first], engines[second]
        return one if self.loads[one] <= self.loads[other] else other
