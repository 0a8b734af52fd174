"""Whatever happens to simulated engines: no block leaks, no job is lost, and time goes on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from hypothesis import given, settings

from kvatlas.ingest.decode.vllm import VllmDecoder
from kvatlas.sim.batching import Engine
from kvatlas.sim.engines import Events, Happening, Kind
from kvatlas.sim.reference import ReferenceEngines
from kvatlas.types import GPU, BlockRemoved, BlockStored
from tests.models.engine_programs import Act, Driven, programs

ENDS = {Kind.FINISHED, Kind.REFUSED}


class Watched(Driven):
    """Engines that stop before and after each step, to be looked at."""

    def __init__(self) -> None:
        self.reference = ReferenceEngines()
        super().__init__(self.reference)
        self.copies: dict[tuple[int, int], Counter[int]] = {}
        """Engine and tier -> copies of each key, as STORED and REMOVED tell."""

    def run(self, until_s: float) -> tuple[float, list[Happening]]:
        told: list[Happening] = []
        while True:
            for stop_s in self._stops(until_s):
                self.now_s, new = super().run(stop_s)
                told += new
                self._note(new)
                self._check()
                if stop_s >= until_s or any(happening.kind is Kind.FINISHED for happening in new):
                    return self.now_s, told

    def _stops(self, until_s: float) -> Iterator[float]:
        """Yield when a step has begun, and when the first one ends."""
        yield min(until_s, math.nextafter(self.now_s, math.inf))
        ends_s = [self.engines.state(engine).step_ends_s for engine in self.specs]
        yield min([until_s, *(end_s for end_s in ends_s if end_s is not None)])

    def do(self, act: Act) -> object:
        answer = super().do(act)
        if act.name == "reset" and answer:
            engine = sorted(self.specs)[act.which % len(self.specs)]
            self.copies[engine, 0] = Counter()
        self._check()
        return answer

    def _note(self, told: list[Happening]) -> None:
        for happening in told:
            copies = self.copies.setdefault((happening.engine, happening.tier), Counter())
            if happening.kind is Kind.STORED:
                keys = self.jobs[happening.job][1].keys
                copies.update(keys[happening.first : happening.first + happening.many])
            elif happening.kind is Kind.REMOVED:
                copies.subtract(happening.keys)

    def _check(self) -> None:
        for number in self.specs:
            engine = self.reference._engines[number]
            check_memory(engine)
            for tier in range(len(engine.memory.tiers) + 1):
                held = Counter(self.copies.get((number, tier)))
                assert min(held.values(), default=0) >= 0
                assert +held == held_by(engine, tier)
            assert len(engine.running) <= engine.spec.running_max
            assert sum(tokens for _, tokens in engine.batch) <= engine.spec.step_tokens_max


def check_memory(engine: Engine) -> None:
    """Every block is free or has users, as many as jobs say; every key leads to its blocks."""
    pool = engine.memory.gpu
    users = Counter(block for work in engine.jobs.values() for block in work.blocks)
    assert [users[block] for block in range(len(pool.users))] == pool.users
    assert set(pool.free) == {block for block, count in enumerate(pool.users) if not count} - {0}
    assert pool.used + len(pool.free) == engine.spec.gpu_blocks - 1
    named = {block: key for block, key in enumerate(pool.key) if key is not None}
    assert {block: key for key, blocks in pool.found.items() for block in blocks} == named
    assert len(named) == pool.cached
    for tier in engine.memory.tiers:
        assert len(tier.keys) <= tier.blocks
    queues = (engine.running, engine.loading, engine.waiting)
    assert sorted(work.job.id for queue in queues for work in queue) == sorted(engine.jobs)


def held_by(engine: Engine, tier: int) -> Counter[int]:
    if tier:
        return Counter(list(engine.memory.tiers[tier - 1].keys))
    return Counter({key: len(blocks) for key, blocks in engine.memory.gpu.found.items()})


@settings(deadline=None, max_examples=150)
@given(programs())
def test_blocks_are_accounted_for_and_events_tell_what_is_cached(program: list[Act]) -> None:
    watched = Watched()
    for act in program:
        watched.do(act)
    watched.finish()
    for engine in watched.specs:
        state = watched.engines.state(engine)
        assert (state.waiting, state.running, state.blocks_used, state.step_ends_s) == (0, 0, 0, None)


@settings(deadline=None, max_examples=300)
@given(programs())
def test_each_job_ends_in_one_way_and_its_life_is_told_in_order(program: list[Act]) -> None:
    driven = Driven(ReferenceEngines())
    for act in program:
        driven.do(act)
    driven.finish()
    ends = Counter(happening.job for happening in driven.told if happening.kind in ENDS)
    ends.update(driven.dropped)
    assert ends == Counter(dict.fromkeys(driven.jobs, 1))
    for number, (engine, job) in driven.jobs.items():
        kinds = (Kind.SCHEDULED, Kind.FIRST_TOKEN, Kind.FINISHED)
        life = [happening for happening in driven.told if happening.job == number and happening.kind in kinds]
        assert [happening.kind for happening in life] == list(kinds[: len(life)])
        assert {happening.engine for happening in life} <= {engine}
        if life:
            assert 0 <= life[0].first + life[0].many <= job.prompt_tokens - 1


@settings(deadline=None, max_examples=200)
@given(programs())
def test_time_goes_on_and_happenings_come_in_its_order(program: list[Act]) -> None:
    driven = Driven(ReferenceEngines())
    for act in program:
        before_s, told = driven.now_s, len(driven.told)
        driven.do(act)
        assert driven.now_s >= before_s
        new = [(happening.at_s, happening.engine) for happening in driven.told[told:]]
        assert new == sorted(new)
        assert all(before_s <= at_s <= driven.now_s for at_s, _ in new if act.name == "run")


@settings(deadline=None, max_examples=100)
@given(programs())
def test_steps_are_the_same_where_events_are_not_asked_for(program: list[Act]) -> None:
    loud, quiet = Driven(ReferenceEngines()), Driven(ReferenceEngines(), Events.NOTHING)
    for act in program:
        loud.do(act)
        quiet.do(act)
    blocks = {Kind.STORED, Kind.REMOVED}
    assert [happening for happening in loud.told if happening.kind not in blocks] == quiet.told


@settings(deadline=None, max_examples=100)
@given(programs())
def test_frames_tell_what_events_tell_one_by_one(program: list[Act]) -> None:
    each, frames = Driven(ReferenceEngines()), Driven(ReferenceEngines(), Events.FRAMES)
    for act in program:
        each.do(act)
        frames.do(act)
    one_by_one = [change for told in each.told for change in _changes(each, told)]
    assert [change for told in frames.told for change in _changes(frames, told)] == one_by_one


def _changes(driven: Driven, told: Happening) -> Iterator[tuple[object, ...]]:
    """Yield which key came to or left a tier, with all that an event says of it."""
    if told.kind is Kind.STORED:
        job, size = driven.jobs[told.job][1], driven.sizes[told.engine]
        for at in range(told.first, told.first + told.many):
            tokens = job.tokens[at * size : (at + 1) * size]
            yield told.at_s, told.engine, told.tier > 0, job.keys[at], job.keys[at - 1] if at else None, tokens
    elif told.kind is Kind.REMOVED:
        for key in told.keys:
            yield told.at_s, told.engine, told.tier > 0, key
    elif told.kind is Kind.PUBLISHED:
        decoded = VllmDecoder().decode(told.payload)
        assert not decoded.faults
        for event in decoded.batches[0].events:
            assert isinstance(event, BlockStored | BlockRemoved)
            for at, key in enumerate(event.hashes):
                below = event.tier != GPU
                if isinstance(event, BlockRemoved):
                    yield told.at_s, told.engine, below, key
                else:
                    size = event.block_size_tokens or 0
                    parent = event.hashes[at - 1] if at else event.parent
                    yield told.at_s, told.engine, below, key, parent, event.token_ids[at * size : (at + 1) * size]
