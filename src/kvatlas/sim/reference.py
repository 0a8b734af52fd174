"""Engines on a virtual clock, in plain Python: slow, obvious, the specification."""

from __future__ import annotations

import math

from kvatlas.sim.batching import Engine
from kvatlas.sim.checks import check_factor, check_job, check_spec, fits
from kvatlas.sim.engines import EngineSpec, EngineState, Events, Happening, Job, Kind


class ReferenceEngines:
    """Any number of engines; a step costs time in proportion to the jobs in it, and to the engines."""

    def __init__(self) -> None:
        self._engines: dict[int, Engine] = {}
        self._joined = 0
        self._now_s = 0.0
        self._refused: list[Happening] = []
        """To be told by the next run."""

    def join(self, spec: EngineSpec, at_s: float) -> int:
        check_spec(spec)
        self._go_to(at_s)
        number = self._joined
        self._engines[number] = Engine(number, spec)
        self._joined += 1
        return number

    def leave(self, engine: int, at_s: float) -> list[int]:
        leaving = self._engine(engine)
        self._go_to(at_s)
        del self._engines[engine]
        refused = [happening.job for happening in self._refused if happening.engine == engine]
        self._refused = [happening for happening in self._refused if happening.engine != engine]
        queues = (leaving.running, leaving.loading, leaving.waiting)
        return [work.job.id for queue in queues for work in queue] + refused

    def add(self, engine: int, job: Job, at_s: float) -> None:
        adding = self._engine(engine)
        check_job(job, adding.spec)
        if job.id in adding.jobs:
            raise ValueError(f"job {job.id}: engine {engine} has a job of this id; give each its own")
        self._go_to(at_s)
        if fits(job, adding.spec):
            adding.add(job, at_s)
        else:
            self._refused.append(Happening(at_s, Kind.REFUSED, engine, job.id))

    def abort(self, engine: int, job: int, at_s: float) -> bool:
        aborting = self._engine(engine)
        self._go_to(at_s)
        return aborting.abort(job, at_s)

    def slow(self, engine: int, factor: float, at_s: float) -> None:
        slowing = self._engine(engine)
        check_factor(factor)
        self._go_to(at_s)
        slowing.slowness = factor

    def reset_cache(self, engine: int, at_s: float) -> bool:
        resetting = self._engine(engine)
        self._go_to(at_s)
        if resetting.memory.gpu.used:
            return False
        resetting.memory.gpu.reset()
        return True

    def run(self, until_s: float, *, events: Events = Events.EACH) -> tuple[float, list[Happening]]:
        if not until_s >= self._now_s:
            raise ValueError(f"until_s: expected {self._now_s} (the time reached) or later, got {until_s}")
        engines = list(self._engines.values())
        for engine in engines:
            engine.told.events = events
        finished = False
        while not finished:
            due_s = min((engine.due_s for engine in engines), default=math.inf)
            if due_s > until_s or due_s == math.inf:
                self._now_s = self._now_s if until_s == math.inf else until_s
                break
            self._now_s = due_s
            for engine in engines:
                if engine.step_ends_s == due_s:
                    finished |= engine.end_step(due_s)
            if due_s == until_s:
                break
            if not finished:
                for engine in engines:
                    if engine.due_s == due_s and engine.step_ends_s is None:
                        engine.begin_step(due_s)
        return self._now_s, self._take_told(engines)

    def state(self, engine: int) -> EngineState:
        return self._engine(engine).state()

    def metrics(self, engine: int) -> EngineState:
        return self._engine(engine).metrics()

    def _engine(self, number: int) -> Engine:
        try:
            return self._engines[number]
        except KeyError:
            raise ValueError(f"engine {number}: there is none of this number; join says which there are") from None

    def _go_to(self, at_s: float) -> None:
        """Let the clock be at a time up to which nothing is due."""
        if not self._now_s <= at_s < math.inf:
            raise ValueError(f"at_s: expected {self._now_s} (the time reached) or later, got {at_s}")
        if any(engine.due_s < at_s for engine in self._engines.values()):
            raise ValueError(f"at_s: engines have work before {at_s}; run up to it first")
        self._now_s = at_s

    def _take_told(self, engines: list[Engine]) -> list[Happening]:
        told, self._refused = self._refused, []
        for engine in engines:
            told += engine.told.take()
        told.sort(key=lambda happening: (happening.at_s, happening.engine))
        return told
