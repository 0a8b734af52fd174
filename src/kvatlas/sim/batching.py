"""One engine: which jobs a step computes, and what becomes of the memory. After vLLM 0.32 (v1/core/sched/scheduler.py)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import islice

from kvatlas.sim.blocks import BlockPool, Tier
from kvatlas.sim.checks import blocks_for
from kvatlas.sim.engines import EngineSpec, EngineState, Happening, Job, Kind

GPU = 0


class Work:
    """A job on its way through an engine."""

    __slots__ = ("blocks", "cached", "computed", "job", "loads", "named", "ready_s", "started", "tokens")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokens = job.prompt_tokens
        """The prompt's, and those of the answer so far. One of them is to be computed, or more."""
        self.computed = 0
        """Tokens whose keys and values are in ``blocks``."""
        self.blocks: list[int] = []
        self.named = 0
        """How many of its blocks can be found by their keys."""
        self.cached = 0
        """Tokens that were on the GPU when it came."""
        self.loads = 0
        """Blocks that are being loaded for it, behind those that were on the GPU."""
        self.ready_s = 0.0
        """When they are there."""
        self.started = False
        """It was told that it runs."""

    @property
    def answering(self) -> bool:
        """All but its newest token is computed, and it has told one before: what comes is a token, not a chunk."""
        return self.tokens > self.job.prompt_tokens and self.computed == self.tokens - 1


class Engine:
    """One engine's queues, memory and step. It knows the time only as it is told."""

    def __init__(self, number: int, spec: EngineSpec) -> None:
        self.number = number
        self.spec = spec
        self.pool = BlockPool(spec.gpu_blocks)
        self.tiers = [Tier(tier.blocks) for tier in spec.tiers]
        self.jobs: dict[int, Work] = {}
        self.running: list[Work] = []
        """In the order in which they were admitted: the last one is preempted first."""
        self.loading: list[Work] = []
        """They have blocks, but wait for what is to be in them."""
        self.waiting: deque[Work] = deque()
        self.batch: list[tuple[Work, int]] = []
        """What the step under way computes: so many tokens of a job."""
        self.step_s = 0.0
        self.step_ends_s: float | None = None
        self.wakes_s = math.inf
        """When a step may begin, if none is under way."""
        self._loads_end_s = 0.0
        self._preemptions = 0
        self._busy_s = 0.0
        self.told: list[Happening] = []
        """What happened and nobody took yet."""
        self.tells_blocks = True
        """Whether STORED and REMOVED are told."""

    @property
    def due_s(self) -> float:
        """When something happens here next; infinity if nothing will by itself."""
        return self.wakes_s if self.step_ends_s is None else self.step_ends_s

    def state(self) -> EngineState:
        return EngineState(
            waiting=len(self.waiting) + len(self.loading),
            running=len(self.running),
            blocks_used=self.pool.used,
            cached_blocks=self.pool.cached,
            step_ends_s=self.step_ends_s,
            preemptions=self._preemptions,
            busy_s=self._busy_s,
        )

    def add(self, job: Job, at_s: float) -> None:
        """Let a job wait that fits."""
        self.jobs[job.id] = work = Work(job)
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
        self.pool.leave(work.blocks)
        self.wakes_s = at_s if self.jobs else math.inf
        return True

    def begin_step(self, at_s: float) -> None:
        """Decide what is computed next, and how long it takes. Nothing may be: then it says when to ask again."""
        preemptions = self._preemptions
        self._schedule(at_s)
        if not self.batch and self._preemptions > preemptions:
            self._schedule(at_s)  # the only job that ran was preempted: others may be let in now
        if self.batch:
            self.step_s = self._seconds()
            self.step_ends_s = at_s + self.step_s
        else:
            self.wakes_s = min((work.ready_s for work in self.loading if work.ready_s > at_s), default=math.inf)

    def end_step(self, at_s: float) -> bool:
        """Let the step's tokens come. Return whether a job finished."""
        finished = False
        for work, computed in self.batch:
            work.computed += computed
            if work.computed == work.tokens:
                work.tokens += 1
                finished |= self._answer(work, at_s)
        self.batch = []
        self._busy_s += self.step_s
        self.step_ends_s = None
        if finished:
            self.running = [work for work in self.running if work.job.id in self.jobs]
        self.wakes_s = at_s if self.jobs else math.inf
        return finished

    # -- what a step computes -----------------------------------------------------------------------------------------

    def _schedule(self, at_s: float) -> None:
        """Jobs that run come first, then those that wait; none of these if one of those had to give way."""
        budget, preempted = self._continue_running(self.spec.step_tokens_max, at_s)
        while not preempted and budget > 0 and len(self.running) < self.spec.running_max:
            work = self._next(at_s)
            if work is None or not self._admit(work, at_s):
                break
            if not work.loads:
                budget -= self._compute(work, budget, at_s)

    def _continue_running(self, budget: int, at_s: float) -> tuple[int, bool]:
        """Give each running job its next tokens. Return the budget left, and whether a job was preempted."""
        preempted = False
        position = 0
        while position < len(self.running) and budget > 0:
            work = self.running[position]
            tokens = work.computed + min(work.tokens - work.computed, budget)
            while self._blocks(tokens) - len(work.blocks) > len(self.pool.free) and position < len(self.running):
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
        """Let a job run, or load what tiers have of it, if there is room for all its tokens so far. Return whether there was."""
        if work.loads:
            self._end_load(work, at_s)
        hits, sources = self._lookup(work)
        evictable = self.pool.unused(hits)
        free = len(self.pool.free)
        if self._blocks(work.tokens) - len(work.blocks) - len(hits) + evictable > free:
            return False
        if sources and len(sources) + evictable > free - self._reserved():
            return False
        if work in self.loading:
            self.loading.remove(work)
        else:
            self.waiting.popleft()
            self._take_hits(work, hits)
        if sources:
            self._begin_load(work, sources, at_s)
        else:
            self.running.append(work)
        return True

    def _lookup(self, work: Work) -> tuple[list[int], list[int]]:
        """Return the blocks on the GPU that a job begins with, and for each of its next ones the tier that has it.

        Never all of its tokens: the last one must be computed for the next one to be known.
        """
        if work.blocks or not self.spec.prefix_caching:
            return [], []
        keys, blocks_max = work.job.keys, (work.tokens - 1) // self.spec.block_size_tokens
        hits = self.pool.prefix(keys, blocks_max)
        sources = []
        for key in islice(keys, len(hits), blocks_max):
            source = next((number for number, tier in enumerate(self.tiers) if key in tier.keys), None)
            if source is None:
                break
            sources.append(source)
        return hits, sources

    def _take_hits(self, work: Work, hits: list[int]) -> None:
        self.pool.use(hits)
        work.blocks = hits
        work.named = len(hits)
        work.computed = len(hits) * self.spec.block_size_tokens
        if not work.started:
            work.cached = work.computed
        self._touch_tiers(work)

    def _compute(self, work: Work, budget: int, at_s: float) -> int:
        """Put a running job's next tokens into the step. Return how many. There is room for them."""
        if not work.started:
            loaded = work.computed - work.cached
            self._tell(at_s, Kind.SCHEDULED, work.job.id, work.cached, loaded)
            work.started = True
        tokens = min(work.tokens - work.computed, budget)
        self._take_blocks(work, self._blocks(work.computed + tokens) - len(work.blocks), at_s)
        self._name_blocks(work, work.computed + tokens, at_s)
        self.batch.append((work, tokens))
        return tokens

    def _preempt(self, work: Work, at_s: float) -> None:
        self.pool.leave(work.blocks)
        work.blocks, work.named, work.computed = [], 0, 0
        self.waiting.appendleft(work)
        self._preemptions += 1
        self._tell(at_s, Kind.PREEMPTED, work.job.id)

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
            self._tell(at_s, Kind.FIRST_TOKEN, work.job.id)
        if answered < work.job.output_tokens:
            return False
        self._tell(at_s, Kind.FINISHED, work.job.id)
        del self.jobs[work.job.id]
        self.pool.leave(work.blocks)
        self._touch_tiers(work)
        return True

    # -- memory -------------------------------------------------------------------------------------------------------

    def _blocks(self, tokens: int) -> int:
        return blocks_for(tokens, self.spec.block_size_tokens)

    def _reserved(self) -> int:
        """Count the blocks that jobs yet need for their prompts. A load must not take them, because it is not preempted."""
        unfinished = [work for work in self.running if not work.answering] + self.loading
        return sum(self._blocks(work.tokens) - len(work.blocks) for work in unfinished)

    def _take_blocks(self, work: Work, wanted: int, at_s: float) -> None:
        taken, lost = self.pool.take(max(wanted, 0))
        work.blocks += taken
        self._tell_removed(GPU, lost, at_s)

    def _name_blocks(self, work: Work, tokens: int, at_s: float) -> None:
        """Let the full ones of a job's blocks be found by their keys, and write them to the tiers."""
        full = tokens // self.spec.block_size_tokens
        if full <= work.named or not self.spec.prefix_caching:
            return
        first, work.named = work.named, full
        keys = work.job.keys[first:full]
        for block, key in zip(work.blocks[first:full], keys, strict=True):
            self.pool.name(block, key)
        self._tell_stored(GPU, work, [first], [full - first], at_s)
        for number, tier in enumerate(self.tiers, 1):
            new, lost = tier.store(keys)
            self._tell_removed(number, lost, at_s)
            begins, lengths = _runs(new)
            self._tell_stored(number, work, [first + begin for begin in begins], lengths, at_s)

    def _begin_load(self, work: Work, sources: list[int], at_s: float) -> None:
        """Loads of one engine come one after the other; those of one job from tier to tier."""
        self._take_blocks(work, len(sources), at_s)
        work.loads = len(sources)
        seconds = 0.0
        for number, tier in enumerate(self.spec.tiers):
            if blocks := sources.count(number):
                seconds += tier.latency_s + blocks * tier.load_block_s
        self._loads_end_s = work.ready_s = max(at_s, self._loads_end_s) + seconds
        self.loading.append(work)

    def _end_load(self, work: Work, at_s: float) -> None:
        work.computed += work.loads * self.spec.block_size_tokens
        work.loads = 0
        self._name_blocks(work, work.computed, at_s)

    def _touch_tiers(self, work: Work) -> None:
        for tier in self.tiers:
            tier.touch(work.job.keys[: work.tokens // self.spec.block_size_tokens])

    # -- what is told -------------------------------------------------------------------------------------------------

    def _tell(self, at_s: float, kind: Kind, job: int, first: int = 0, many: int = 0) -> None:
        self.told.append(Happening(at_s, kind, self.number, job, first, many))

    def _tell_stored(self, tier: int, work: Work, firsts: list[int], lengths: list[int], at_s: float) -> None:
        if self.tells_blocks:
            for first, many in zip(firsts, lengths, strict=True):
                self.told.append(Happening(at_s, Kind.STORED, self.number, work.job.id, first, many, tier))

    def _tell_removed(self, tier: int, keys: list[int], at_s: float) -> None:
        if keys and self.tells_blocks:
            self.told.append(Happening(at_s, Kind.REMOVED, self.number, tier=tier, keys=keys))


def _runs(positions: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return where runs of consecutive positions begin, and how long they are."""
    begins: list[int] = []
    lengths: list[int] = []
    for position, last in zip(positions, [None, *positions], strict=False):
        if last is not None and position == last + 1:
            lengths[-1] += 1
        else:
            begins.append(position)
            lengths.append(1)
    return begins, lengths
