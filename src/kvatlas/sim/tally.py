"""What a run shows, counted while it goes on: memory does not grow with the number of requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvatlas.sim.engines import EngineSpec, EngineState
from kvatlas.sim.request import Request
from kvatlas.sim.results import EngineResult, Moment, PhaseResult, RunResult
from kvatlas.sim.spreads import SpreadCounter

MOMENTS_MAX = 120
"""When there are more parts than this, each two become one."""
FIRST_PART_S = 1.0


class _Part:
    """One part of the run."""

    __slots__ = ("arrived", "cached", "finished", "first_tokens", "output", "prompt", "running", "ttft_s", "waiting")

    def __init__(self) -> None:
        self.arrived = self.finished = self.first_tokens = self.prompt = self.cached = self.output = 0
        self.ttft_s = 0.0
        self.waiting = self.running = 0

    def add(self, later: _Part) -> None:
        for name in ("arrived", "finished", "first_tokens", "prompt", "cached", "output", "ttft_s"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.waiting, self.running = later.waiting, later.running

    def moment(self, from_s: float) -> Moment:
        return Moment(
            from_s=from_s,
            arrived=self.arrived,
            finished=self.finished,
            ttft_mean_s=self.ttft_s / self.first_tokens if self.first_tokens else 0.0,
            cached_share=self.cached / self.prompt if self.prompt else 0.0,
            waiting=self.waiting,
            running=self.running,
            output_tokens=self.output,
        )


class _Timeline:
    """The run in parts of equal length, of which there are never more than twice MOMENTS_MAX."""

    def __init__(self) -> None:
        self.part_s = FIRST_PART_S
        self.now = _Part()
        self._parts = [self.now]
        self._ends_s = self.part_s

    def reach(self, at_s: float) -> None:
        while at_s >= self._ends_s:
            before, self.now = self.now, _Part()
            self.now.waiting, self.now.running = before.waiting, before.running
            self._parts.append(self.now)
            if len(self._parts) > 2 * MOMENTS_MAX:
                self._fold()
            self._ends_s = len(self._parts) * self.part_s

    def moments(self) -> tuple[Moment, ...]:
        while len(self._parts) > MOMENTS_MAX:
            self._fold()
        return tuple(part.moment(at * self.part_s) for at, part in enumerate(self._parts))

    def _fold(self) -> None:
        self.part_s *= 2
        for at in range(0, len(self._parts) - 1, 2):
            self._parts[at].add(self._parts[at + 1])
        self._parts = self._parts[::2]
        self.now = self._parts[-1]


class _EngineTally:
    """One engine's share."""

    __slots__ = ("busy_s", "cached", "kv_usage", "output", "preemptions", "prompt", "requests", "running", "samples", "waiting")

    def __init__(self) -> None:
        self.requests = self.prompt = self.cached = self.output = self.preemptions = 0
        self.samples = self.waiting = self.running = 0
        self.kv_usage = self.busy_s = 0.0

    def result(self, name: str, duration_s: float) -> EngineResult:
        samples = max(1, self.samples)
        return EngineResult(
            name=name,
            requests=self.requests,
            prompt_tokens=self.prompt,
            cached_tokens=self.cached,
            output_tokens=self.output,
            busy=min(1.0, self.busy_s / duration_s) if duration_s else 0.0,  # sums of steps are rounded
            waiting_mean=self.waiting / samples,
            running_mean=self.running / samples,
            kv_usage_mean=self.kv_usage / samples,
            preemptions=self.preemptions,
        )


class _PhaseTally:
    """The requests of one part of the workload."""

    __slots__ = ("arrived", "cached", "finished", "first_s", "last_s", "output", "prompt", "tpot", "ttft")

    def __init__(self, at_s: float) -> None:
        self.first_s = self.last_s = at_s
        self.arrived = self.finished = self.prompt = self.cached = self.output = 0
        self.ttft, self.tpot = SpreadCounter(), SpreadCounter()

    def answered(self, request: Request, at_s: float) -> None:
        assert request.first_token_s is not None
        output = request.arrival.output_tokens
        self.last_s = at_s
        self.finished += 1
        self.prompt += request.arrival.prompt_tokens
        self.cached += request.cached_tokens
        self.output += output
        self.ttft.add(request.first_token_s - request.arrived_s)
        if output > 1:
            self.tpot.add((at_s - request.first_token_s) / (output - 1))

    def result(self, name: str) -> PhaseResult:
        return PhaseResult(
            name=name,
            from_s=self.first_s,
            duration_s=self.last_s - self.first_s,
            arrived=self.arrived,
            finished=self.finished,
            prompt_tokens=self.prompt,
            cached_tokens=self.cached,
            output_tokens=self.output,
            ttft=self.ttft.spread(),
            tpot=self.tpot.spread(),
        )


class Tally:
    """Counts. Prompts, their cached tokens and all times are those of requests that were answered to their end."""

    def __init__(self) -> None:
        self.arrived = self.finished = self.refused = self.gave_up = self.cancelled = self.foreign = 0
        self.prompt = self.cached = self.loaded = self.output = 0
        self.ttft, self.tpot, self.e2e, self.queue = SpreadCounter(), SpreadCounter(), SpreadCounter(), SpreadCounter()
        self._timeline = _Timeline()
        self._engines: list[_EngineTally] = []
        self._phases: dict[str, _PhaseTally] = {}
        self._first_s: float | None = None
        self._last_s = 0.0

    def engine_joined(self) -> None:
        self._engines.append(_EngineTally())

    def arrives(self, at_s: float, phase: str) -> None:
        if self._first_s is None:
            self._first_s = self._last_s = at_s
        self.arrived += 1
        self._timeline.reach(at_s)
        self._timeline.now.arrived += 1
        if phase:
            if phase not in self._phases:
                self._phases[phase] = _PhaseTally(at_s)
            self._phases[phase].arrived += 1

    def first_token(self, request: Request, at_s: float) -> None:
        self._timeline.reach(at_s)
        part = self._timeline.now
        part.first_tokens += 1
        part.ttft_s += at_s - request.arrived_s

    def cancels(self, request: Request) -> None:
        """Note that a request's client went."""
        if request.first_token_s is None:
            self.gave_up += 1
        else:
            self.cancelled += 1

    def answered(self, request: Request, at_s: float) -> None:
        """Note a request's last token. It was scheduled, and had a first token."""
        assert request.scheduled_s is not None
        assert request.first_token_s is not None
        output, prompt = request.arrival.output_tokens, request.arrival.prompt_tokens
        cached = request.cached_tokens
        self._last_s = at_s
        self.finished += 1
        self.prompt += prompt
        self.cached += cached
        self.loaded += request.loaded_tokens
        self.output += output
        self.ttft.add(request.first_token_s - request.arrived_s)
        self.e2e.add(at_s - request.arrived_s)
        self.queue.add(request.scheduled_s - request.arrived_s)
        if output > 1:
            self.tpot.add((at_s - request.first_token_s) / (output - 1))
        self._timeline.reach(at_s)
        part = self._timeline.now
        part.finished += 1
        part.prompt += prompt
        part.cached += cached
        part.output += output
        if request.arrival.phase:
            self._phases[request.arrival.phase].answered(request, at_s)
        engine = self._engines[request.engine]
        engine.requests += 1
        engine.prompt += prompt
        engine.cached += cached
        engine.output += output

    def sampled(self, specs: Mapping[int, EngineSpec], states: Mapping[int, EngineState], at_s: float, idle: int) -> None:
        """Note how busy all engines are: at equal intervals, so that means over these are means over time.

        ``idle``: how many times before nobody looked, since nothing was in flight.
        """
        self._timeline.reach(at_s)
        for number, state in states.items():
            engine = self._engines[number]
            engine.samples += 1 + idle
            engine.waiting += state.waiting
            engine.running += state.running
            engine.kv_usage += specs[number].kv_usage(state.blocks_used)
        self.queues(states.values())

    def queues(self, states: Iterable[EngineState]) -> None:
        """Note all engines' queues as those that this part of the run ends with, unless there will be later ones."""
        part = self._timeline.now
        part.waiting = part.running = 0
        for state in states:
            part.waiting += state.waiting
            part.running += state.running

    def engine_ends(self, number: int, state: EngineState) -> None:
        """Note an engine's last state: it leaves, or the run is over."""
        self._engines[number].busy_s = state.busy_s
        self._engines[number].preemptions = state.preemptions

    def result(self, *, policy: str, workload: str, seed: int, names: list[str], wall_s: float, notes: list[str]) -> RunResult:
        duration_s = self._last_s - (self._first_s or 0.0)
        return RunResult(
            policy=policy,
            workload=workload,
            seed=seed,
            engines=tuple(engine.result(name, duration_s) for name, engine in zip(names, self._engines, strict=True)),
            arrived=self.arrived,
            finished=self.finished,
            refused=self.refused,
            gave_up=self.gave_up,
            cancelled=self.cancelled,
            foreign=self.foreign,
            duration_s=duration_s,
            wall_s=wall_s,
            prompt_tokens=self.prompt,
            cached_tokens=self.cached,
            loaded_tokens=self.loaded,
            output_tokens=self.output,
            preemptions=sum(engine.preemptions for engine in self._engines),
            ttft=self.ttft.spread(),
            tpot=self.tpot.spread(),
            e2e=self.e2e.spread(),
            queue=self.queue.spread(),
            moments=self._timeline.moments(),
            phases=tuple(phase.result(name) for name, phase in self._phases.items()),
            notes=tuple(notes),
        )
