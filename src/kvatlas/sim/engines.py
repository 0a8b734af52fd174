"""What a simulated engine is told, and what it tells: the interface of the reference and of the native core."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from kvatlas.sim.costs import EngineCosts


class TierSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Memory below the GPU's that keeps blocks which were computed: written through, least recently used go first."""

    name: str
    """As events name it: ``cpu``, ``disk``."""
    blocks: int
    load_block_s: float
    """Seconds to load one block; loads of one engine are done one after the other."""
    latency_s: float = 0.0
    """Of a load at all."""


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One engine. Defaults are vLLM's."""

    costs: EngineCosts
    gpu_blocks: int
    """KV blocks on the GPU, as vLLM counts them: one of them is never used."""
    block_size_tokens: int = 16
    step_tokens_max: int = 8192
    """``max_num_batched_tokens``: a longer prompt is computed in chunks."""
    running_max: int = 256
    """``max_num_seqs``."""
    prefix_caching: bool = True
    tiers: tuple[TierSpec, ...] = ()
    """From fast to slow."""

    def kv_usage(self, blocks_used: int) -> float:
        """Return the share of GPU blocks in use, as vLLM tells it: one block is never given out."""
        return blocks_used / max(1, self.gpu_blocks - 1)


NO_TOKENS = array("I")


class Job(NamedTuple):
    """One request at an engine."""

    id: int
    """Of 64 bits, and no other job's at the same engine."""
    keys: array[int]
    """array('Q'): the block hashes of prompt and answer, whole blocks of the engine's size; chained, so none comes twice."""
    prompt_tokens: int
    output_tokens: int
    """At least 1."""
    tokens: array[int] = NO_TOKENS
    """array('I'): those of prompt and answer, of which frames tell. Of a job without them, frames tell the keys alone."""


class Events(enum.IntEnum):
    """How it is told what steps did to caches."""

    NOTHING = 0
    EACH = 1
    """Each by itself: STORED and REMOVED."""
    FRAMES = 2
    """PUBLISHED: all that one step did, as a real engine would publish it."""


class Kind(enum.IntEnum):
    """What happened. Which fields of a :class:`Happening` say what."""

    SCHEDULED = 0
    """A job runs for the first time: ``first`` tokens were cached on the GPU, ``many`` more are loaded from tiers."""
    FIRST_TOKEN = 1
    FINISHED = 2
    """Its last token."""
    PREEMPTED = 3
    """It waits again, and will be computed anew as far as its blocks get lost."""
    STORED = 4
    """The job's blocks ``first`` to ``first + many`` are in ``tier`` now (events.BlockStored)."""
    REMOVED = 5
    """``keys`` are not in ``tier`` any more. One of several copies of a block is told as each copy goes."""
    REFUSED = 6
    """A job that this engine can never run: longer than its whole memory."""
    PUBLISHED = 7
    """What a step did to the cache, as it began: ``payload``. STORED and REMOVED in another form."""


class Happening(NamedTuple):
    """One of them, at one engine."""

    at_s: float
    kind: Kind
    engine: int
    job: int = 0
    """Its id; 0 for REMOVED."""
    first: int = 0
    many: int = 0
    tier: int = 0
    """0: the GPU; else ``spec.tiers[tier - 1]``."""
    keys: Sequence[int] = ()
    payload: bytes = b""
    """In vLLM's format: see ``sim.frame``."""


class EngineState(NamedTuple):
    """How busy an engine is."""

    waiting: int
    """Also those whose blocks are being loaded."""
    running: int
    blocks_used: int
    """Held by jobs: without those that are only cached."""
    cached_blocks: int
    """GPU blocks with a hash, in use or not."""
    step_ends_s: float | None
    """None: it is idle, or only loads."""
    preemptions: int
    busy_s: float
    """Time spent in steps so far."""


class Engines(Protocol):
    """Engines on one virtual clock, which never goes back. Errors in the arguments raise ValueError before anything changes.

    A step begins when an engine has work and none is under way, at the time of the last step's end or of the job that came;
    all jobs added for that very time take part. What the step does is decided when it begins, and told at that time
    (SCHEDULED, PREEMPTED; STORED and REMOVED, or PUBLISHED); tokens come when it ends (FIRST_TOKEN, FINISHED). REFUSED is
    told by the next run.

    ``at_s`` is the time reached, or a later one up to which no engine has anything to do.
    """

    def join(self, spec: EngineSpec, at_s: float) -> int:
        """Add an engine, with nothing in its cache. Return its number: 0, 1, ..., never given twice."""
        ...

    def leave(self, engine: int, at_s: float) -> list[int]:
        """Take an engine away, without its happenings. Return the ids of its jobs, those that ran before those that waited.

        Those that it would refuse, which nobody has been told yet, are among them.
        """
        ...

    def add(self, engine: int, job: Job, at_s: float) -> None:
        """Give an engine a job. Jobs wait in the order of coming."""
        ...

    def abort(self, engine: int, job: int, at_s: float) -> bool:
        """Drop a job: its client went. Return whether it was there."""
        ...

    def slow(self, engine: int, factor: float, at_s: float) -> None:
        """Let an engine's steps take ``factor`` times as long as its costs say, from the next one on; 1: as at first.

        The step under way ends when it would have, and loads from tiers take as long as ever.
        """
        ...

    def reset_cache(self, engine: int, at_s: float) -> bool:
        """Forget all cached blocks of the GPU (vLLM's /reset_prefix_cache). Return False, and do nothing, while jobs run."""
        ...

    def run(self, until_s: float, *, events: Events = Events.EACH) -> tuple[float, list[Happening]]:
        """Go on up to a time, or to the first instant at which a job finishes, whichever is earlier.

        Steps that begin exactly at ``until_s`` are not begun yet; it may be infinity: then time stops where no engine has work.
        Return the time reached and what happened, in the order of time, and of engines at one time.
        """
        ...

    def state(self, engine: int) -> EngineState:
        """Return how busy an engine is now."""
        ...

    def metrics(self, engine: int) -> EngineState:
        """Return what an engine says of itself: how busy it was when its last step ended, of the jobs it knew when that began.

        So vLLM's gauges: a step's statistics come with its output, and jobs that come meanwhile wait outside of the scheduler
        (v1/core/sched/scheduler.py, ``make_stats``). Without any job it is what is so now.
        """
        ...
