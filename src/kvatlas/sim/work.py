"""A job on its way through an engine, and what is told of it."""

from __future__ import annotations

from kvatlas.sim.checks import blocks_for
from kvatlas.sim.engines import EngineSpec, Events, Happening, Job, Kind
from kvatlas.sim.frame import Frame

GPU = 0


class Work:
    """A job that waits, loads or runs."""

    __slots__ = ("block_size_tokens", "blocks", "cached", "computed", "job", "loads", "named", "ready_s", "started", "tokens")

    def __init__(self, job: Job, block_size_tokens: int) -> None:
        self.job = job
        self.block_size_tokens = block_size_tokens
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

    def lacks(self, tokens: int) -> int:
        """Return how many blocks more it needs for so many tokens."""
        return max(0, blocks_for(tokens, self.block_size_tokens) - len(self.blocks))

    def begin_anew(self) -> None:
        """Have nothing computed. What was told stays told."""
        self.blocks, self.named, self.computed = [], 0, 0


class Told:
    """What happened at one engine, until somebody takes it."""

    def __init__(self, engine: int, spec: EngineSpec) -> None:
        self.happenings: list[Happening] = []
        self.events = Events.EACH
        self._engine = engine
        self._frame = Frame(spec)

    def take(self) -> list[Happening]:
        taken, self.happenings = self.happenings, []
        return taken

    def job(self, at_s: float, kind: Kind, work: Work, first: int = 0, many: int = 0) -> None:
        self.happenings.append(Happening(at_s, kind, self._engine, work.job.id, first, many))

    def stored(self, at_s: float, work: Work, first: int, many: int, tier: int = GPU) -> None:
        if self.events is Events.EACH:
            self.happenings.append(Happening(at_s, Kind.STORED, self._engine, work.job.id, first, many, tier))
        elif self.events is Events.FRAMES:
            self._frame.stored(work.job, first, many, tier)

    def removed(self, at_s: float, keys: list[int], tier: int = GPU) -> None:
        if not keys:
            return
        if self.events is Events.EACH:
            self.happenings.append(Happening(at_s, Kind.REMOVED, self._engine, tier=tier, keys=keys))
        elif self.events is Events.FRAMES:
            self._frame.removed(keys, tier)

    def publish(self, at_s: float) -> None:
        """Publish what was noted since the last time, if it is told in frames."""
        payload = self._frame.take(at_s)
        if payload is not None:
            self.happenings.append(Happening(at_s, Kind.PUBLISHED, self._engine, payload=payload))
