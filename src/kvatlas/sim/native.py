"""Engines on a virtual clock, in Rust: values carried over, nothing else. :mod:`kvatlas.sim.reference` says what happens."""

from __future__ import annotations

from kvatlas._native import SimulatedEngines
from kvatlas.sim.checks import check_factor, check_job, check_spec
from kvatlas.sim.engines import EngineSpec, EngineState, Events, Happening, Job, Kind


class NativeEngines:
    """Any number of engines. Jobs that only get their next token cost a step almost nothing."""

    def __init__(self) -> None:
        self._core = SimulatedEngines(Happening, list(Kind), EngineState)
        self._specs: dict[int, EngineSpec] = {}

    def join(self, spec: EngineSpec, at_s: float) -> int:
        check_spec(spec)
        costs = spec.costs
        number = self._core.join(
            (
                costs.step_s,
                costs.prefill_token_s,
                costs.prefill_context_s,
                costs.decode_request_s,
                costs.decode_context_s,
            ),
            spec.gpu_blocks,
            spec.block_size_tokens,
            spec.step_tokens_max,
            spec.running_max,
            spec.prefix_caching,
            [(tier.name, tier.blocks, tier.load_block_s, tier.latency_s) for tier in spec.tiers],
            at_s,
        )
        self._specs[number] = spec
        return number

    def leave(self, engine: int, at_s: float) -> list[int]:
        jobs = self._core.leave(engine, at_s)
        del self._specs[engine]
        return jobs

    def add(self, engine: int, job: Job, at_s: float) -> None:
        if engine in self._specs:
            check_job(job, self._specs[engine])
        self._core.add(engine, job, at_s)

    def abort(self, engine: int, job: int, at_s: float) -> bool:
        return self._core.abort(engine, job, at_s)

    def slow(self, engine: int, factor: float, at_s: float) -> None:
        check_factor(factor)
        self._core.slow(engine, factor, at_s)

    def reset_cache(self, engine: int, at_s: float) -> bool:
        return self._core.reset_cache(engine, at_s)

    def run(self, until_s: float, *, events: Events = Events.EACH) -> tuple[float, list[Happening]]:
        return self._core.run(until_s, events)

    def state(self, engine: int) -> EngineState:
        return self._core.state(engine)

    def metrics(self, engine: int) -> EngineState:
        return self._core.metrics(engine)
