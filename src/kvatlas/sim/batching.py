"""One engine: which jobs a step computes, and how long it takes. After vLLM 0.32 (v1/core/sched/scheduler.py)."""

from __future__ import annotations

import math
from collections import deque

from kvatlas.sim.engines import EngineSpec, EngineState, Job, Kind
from kvatlas.sim.memory import Memory
from kvatlas.sim.work import Told, Work


class Engine:
    """One engine's queues, memory and step. It knows the time only as it is told."""

    def __init__(self, number: int, spec: EngineSpec) -> None:
        self.spec = spec
        self.told = Told(number, spec)
        self.memory = Memory(spec, self.told)
        self.jobs: dict[int, Work] = {}
        self.running: list[Work] = []
        """In the order in which they were admitted: the last one is preempted first."""
        self.loading: list[Work] = []
        """They have blocks, but wait for what is to be in them."""
        self.waiting: deque[Work] = deque()
        self.batch: list[tuple[Work, int]] = []
        """What the step under way computes: so many tokens of a job."""
        self.step_ends_s: float | None = None
        self.wakes_s = math.inf
        """When a step may begin, if none is under way."""
        self.slowness = 1.0
        """So many times as long as the costs say a step takes that begins now."""
        self._step_s = 0.0
        self._loads_end_s = 0.0
        self._preemptions = 0
        self._busy_s = 0.0
        self._left_waiting = 0
        """Jobs that waited when the step under way began."""
        self._metrics: EngineState | None = None

    @property
    def due_s(self) -> float:
        """When something happens here next; infinity if nothing will by itself."""
        return self.wakes_s if self.step_ends_s is None else self.step_ends_s

    def state(self) -> EngineState:
        return EngineState(
            waiting=len(self.waiting) + len(self.loading),
            running=len(self.running),
            blocks_used=self.memory.gpu.used,
            cached_blocks=self.memory.gpu.cached,
            step_ends_s=self.step_ends_s,
            preemptions=self._preemptions,
            busy_s=self._busy_s,
        )

    def metrics(self) -> EngineState:
        return self.state() if self._metrics is None or not self.jobs else self._metrics

    def add(self, job: Job, at_s: float) -> None:
        """Let a job wait that fits into the memory."""
        self.jobs[job.id] = work = Work(job, self.spec.block_size_tokens)
        self.waiting.append(work)
        self.wakes_s = at_s

    def abort(self, job: int, at_s: float) -> bool:
        """Drop a job, also out of the step under way, whose length stays. Return whether it was there."""
        work = self.jobs.pop(job, None)
        if work is None:
            return False
        for queue in (self.running, self.loading, self.waiting):
            if work in queue:
                queue.remove(work)
        self.batch = [entry for entry in self.batch if entry[0] is not work]
        self.memory.leave(work)
        self.wakes_s = at_s if self.jobs else math.inf
        return True

    def begin_step(self, at_s: float) -> None:
        """Decide what is computed next, and how long it takes. Nothing may be: then it says when to ask again."""
        preemptions = self._preemptions
        self._schedule(at_s)
        if not self.batch and self._preemptions > preemptions:
            self._schedule(at_s)  # the only job that ran had to give way: now others may be let in
        self.told.publish(at_s)
        if self.batch:
            self._step_s = self.slowness * self._seconds()
            self.step_ends_s = at_s + self._step_s
            self._left_waiting = len(self.waiting) + len(self.loading)
        else:
            self.wakes_s = min((work.ready_s for work in self.loading if work.ready_s > at_s), default=math.inf)
            self._metrics = self.state()

    def end_step(self, at_s: float) -> bool:
        """Let the step's tokens come. Return whether a job finished."""
        finished = False
        for work, computed in self.batch:
            work.computed += computed
            if work.computed == work.tokens:
                work.tokens += 1
                finished |= self._answer(work, at_s)
        self.batch = []
        self._busy_s += self._step_s
        self.step_ends_s = None
        if finished:
            self.running = [work for work in self.running if work.job.id in self.jobs]
        self.wakes_s = at_s if self.jobs else math.inf
        self._metrics = self.state()._replace(waiting=self._left_waiting)
        return finished

    def _schedule(self, at_s: float) -> None:
        """Jobs that run come first, then those that wait; none of these if one of those had to give way."""
        budget, preempted = self._continue_running(at_s)
        while not preempted and budget > 0 and len(self.running) < self.spec.running_max:
            work = self._next(at_s)
            if work is None or not self._admit(work, at_s):
                break
            if not work.loads:
                budget -= self._compute(work, budget, at_s)

    def _continue_running(self, at_s: float) -> tuple[int, bool]:
        """Give each running job its next tokens. Return how many more fit into the step, and whether a job had to give way."""
        budget, preempted = self.spec.step_tokens_max, False
        position = 0
        while position < len(self.running) and budget > 0:
            work = self.running[position]
            tokens = work.computed + min(work.tokens - work.computed, budget)
            while position < len(self.running) and work.lacks(tokens) > len(self.memory.gpu.free):
                self._preempt(self.running.pop(), at_s)
                preempted = True
            if position < len(self.running):
                budget -= self._compute(work, budget, at_s)
                position += 1
        return budget, preempted

    def _next(self, at_s: float) -> Work | None:
        """Return who would be let in next: those that hold blocks come before those that hold none."""
        ready = next((work for work in self.loading if work.ready_s <= at_s), None)
        return ready or (self.waiting[0] if self.waiting else None)

    def _admit(self, work: Work, at_s: float) -> bool:
        """Let a job run, or begin to load what tiers have of it. Return False where its tokens do not fit in."""
        free = len(self.memory.gpu.free)
        if work in self.loading:
            if work.loads:
                self._end_load(work, at_s)
            if work.lacks(work.tokens) > free:
                return False
            self.loading.remove(work)
            self.running.append(work)
            return True
        hits, sources = self.memory.lookup(work)
        idle = self.memory.gpu.unused(hits)
        if work.lacks(work.tokens) - len(hits) + idle > free or (sources and len(sources) + idle > free - self._reserved()):
            return False
        self.waiting.popleft()
        self.memory.use(work, hits)
        if sources:
            self._begin_load(work, sources, at_s)
        else:
            self.running.append(work)
        return True

    def _reserved(self) -> int:
        """Count the blocks that jobs yet need for their prompts. A load must not take them, because it is not preempted."""
        unfinished = [work for work in self.running if not work.answering] + self.loading
        return sum(work.lacks(work.tokens) for work in unfinished)

    def _begin_load(self, work: Work, sources: list[int], at_s: float) -> None:
        """Loads of one engine come one after the other."""
        self.memory.take(work, len(sources), at_s)
        work.loads = len(sources)
        self._loads_end_s = work.ready_s = max(at_s, self._loads_end_s) + self.memory.load_seconds(sources)
        self.loading.append(work)

    def _end_load(self, work: Work, at_s: float) -> None:
        work.computed += work.loads * self.spec.block_size_tokens
        work.loads = 0
        self.memory.name(work, work.computed, at_s)

    def _compute(self, work: Work, budget: int, at_s: float) -> int:
        """Put a running job's next tokens into the step, for which there is room. Return how many."""
        if not work.started:
            self.told.job(at_s, Kind.SCHEDULED, work, work.cached, work.computed - work.cached)
            work.started = True
        tokens = min(work.tokens - work.computed, budget)
        self.memory.take(work, work.lacks(work.computed + tokens), at_s)
        self.memory.name(work, work.computed + tokens, at_s)
        self.batch.append((work, tokens))
        return tokens

    def _preempt(self, work: Work, at_s: float) -> None:
        self.memory.leave(work)
        work.begin_anew()
        self.waiting.appendleft(work)
        self._preemptions += 1
        self.told.job(at_s, Kind.PREEMPTED, work)

    def _seconds(self) -> float:
        prompt_tokens = prompt_pairs = decodes = decode_context = 0
        for work, tokens in self.batch:
            if work.answering:
                decodes += 1
                decode_context += work.computed
            else:
                prompt_tokens += tokens
                prompt_pairs += tokens * (2 * work.computed + tokens)
        return self.spec.costs.step_seconds(prompt_tokens, prompt_pairs, decodes, decode_context)

    def _answer(self, work: Work, at_s: float) -> bool:
        """Tell a job's newest token. Return whether it was its last."""
        answered = work.tokens - work.job.prompt_tokens
        if answered == 1:
            self.told.job(at_s, Kind.FIRST_TOKEN, work)
        if answered < work.job.output_tokens:
            return False
        self.told.job(at_s, Kind.FINISHED, work)
        del self.jobs[work.job.id]
        self.memory.leave(work, used=True)
        return True
