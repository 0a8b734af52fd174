"""Random lives of simulated engines: jobs come and go, engines join and leave, and time goes on."""

from __future__ import annotations

import math
from array import array
from typing import Any, NamedTuple

from hypothesis import strategies as st

from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import Engines, EngineSpec, Events, Happening, Job, TierSpec

_seconds = st.sampled_from([0.0, 0.001, 0.0137, 0.25])


class Act(NamedTuple):
    """One thing that is done to engines: the method's name, and numbers that say which engine, job, and so on."""

    name: str
    spec: EngineSpec | None = None
    which: int = 0
    family: int = 0
    """Jobs of one family share their first blocks."""
    shared: int = 0
    prompt: int = 1
    output: int = 1
    seconds: float = 0.0
    factor: float = 1.0


@st.composite
def specs(draw: st.DrawFn) -> EngineSpec:
    costs = EngineCosts(
        step_s=draw(_seconds),
        prefill_token_s=draw(st.sampled_from([0.0, 1e-5, 0.0003])),
        prefill_context_s=draw(st.sampled_from([0.0, 1e-9, 3.3e-7])),
        decode_request_s=draw(st.sampled_from([0.0, 1e-4, 0.0007])),
        decode_context_s=draw(st.sampled_from([0.0, 1e-8, 1.7e-6])),
    )
    tiers = st.builds(TierSpec, name=st.just("t"), blocks=st.integers(1, 40), load_block_s=_seconds, latency_s=_seconds)
    return EngineSpec(
        costs=costs,
        gpu_blocks=draw(st.integers(2, 30)),
        block_size_tokens=draw(st.sampled_from([1, 4, 16])),
        step_tokens_max=draw(st.sampled_from([1, 7, 64, 8192])),
        running_max=draw(st.integers(1, 6)),
        prefix_caching=draw(st.sampled_from([True, True, True, False])),
        tiers=tuple(draw(st.lists(tiers, max_size=2))),
    )


def _act(name: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Act]:
    return st.fixed_dictionaries(fields).map(lambda drawn: Act(name, **drawn))


_which = st.integers(0, 7)
_adds = _act(
    "add",
    which=_which,
    family=st.integers(0, 2),
    shared=st.integers(0, 12),
    prompt=st.integers(1, 150),
    output=st.integers(1, 40),
)
_runs = _act("run", seconds=st.sampled_from([0.0, 0.001, 0.02, 0.3, 2.0, math.inf]))
_slows = _act("slow", which=_which, factor=st.sampled_from([1.0, 0.5, 3.0, 10.7]))
_rare = st.one_of(*(_act(name, which=_which) for name in ("abort", "leave", "reset")), _act("join", spec=specs()), _slows)
_acts = st.one_of(_adds, _adds, _adds, _runs, _runs, _rare)


@st.composite
def programs(draw: st.DrawFn) -> list[Act]:
    return [Act("join", spec=draw(specs())), *draw(st.lists(_acts, max_size=40))]


class Driven:
    """Engines that a program is done to. It keeps book of what became of the jobs."""

    def __init__(self, engines: Engines, events: Events = Events.EACH) -> None:
        self.engines = engines
        self.events = events
        self.now_s = 0.0
        self.specs: dict[int, EngineSpec] = {}
        """Of those that have not left."""
        self.sizes: list[int] = []
        """Tokens in a block of each that ever was."""
        self.jobs: dict[int, tuple[int, Job]] = {}
        """Id -> the engine that got it, and the job."""
        self.dropped: list[int] = []
        """Jobs that were aborted, or whose engine left."""
        self.told: list[Happening] = []

    def do(self, act: Act) -> Any:
        """Do one thing; return what the engines answered."""
        if act.spec is not None:
            number = self.engines.join(act.spec, self.now_s)
            self.specs[number] = act.spec
            self.sizes.append(act.spec.block_size_tokens)
            return number
        if act.name == "run":
            return self.run(self.now_s + act.seconds)
        return self._do_at(sorted(self.specs)[act.which % len(self.specs)], act) if self.specs else None

    def _do_at(self, engine: int, act: Act) -> Any:
        if act.name == "add":
            job = make_job(len(self.jobs) + 1, act, self.specs[engine].block_size_tokens)
            self.jobs[job.id] = engine, job
            self.engines.add(engine, job, self.now_s)
        if act.name == "leave":
            left = self.engines.leave(engine, self.now_s)
            del self.specs[engine]
            self.dropped += left
            return left
        if act.name == "reset":
            return self.engines.reset_cache(engine, self.now_s)
        if act.name == "slow":
            self.engines.slow(engine, act.factor, self.now_s)
        if act.name == "abort" and self.jobs:
            victim = list(self.jobs)[-1 - act.which % len(self.jobs)]
            aborted = self.engines.abort(engine, victim, self.now_s)
            self.dropped += [victim] * aborted
            return aborted
        return None

    def run(self, until_s: float) -> tuple[float, list[Happening]]:
        self.now_s, told = self.engines.run(until_s, events=self.events)
        self.told += told
        return self.now_s, told

    def finish(self) -> None:
        """Go on until nothing happens any more."""
        while self.run(math.inf)[1]:
            pass


def make_job(number: int, act: Act, block_size_tokens: int) -> Job:
    """Return a job whose first blocks are its family's."""
    blocks = (act.prompt + act.output) // block_size_tokens
    keys = array("Q", [act.family * 1000 + i if i < act.shared else number * 10_000 + i for i in range(blocks)])
    tokens = array("I", (keys[i // block_size_tokens] * 7919 & 0xFFFF_FFFF for i in range(blocks * block_size_tokens)))
    return Job(number, keys, act.prompt, act.output, tokens)
