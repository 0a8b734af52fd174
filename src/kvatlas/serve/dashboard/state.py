"""What the page shows, as values: rows of engines, what the service is, and all of that as one answer."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from kvatlas.serve.routing.explain import DecisionShown
from kvatlas.types import IndexStats, StaleReason, Tier

SILENT = "silent"
"""The state of an endpoint of which no event stream was ever heard."""


class EngineRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine (one rank): its event stream, and what routing knows of it. None: there is no such thing here."""

    name: str
    """The endpoint's, where there is one, else the stream's."""
    state: str
    """fresh, stale, connecting (no event yet), silent (an endpoint without a stream)."""
    stale_reason: StaleReason | None = None
    model: str | None = None
    source: str = ""
    blocks: int = 0
    orphans: int = 0
    tiers: tuple[Tier, ...] = ()
    block_sizes_tokens: tuple[int, ...] = ()
    queue_depth: int = 0
    gaps: int = 0
    restarts: int = 0
    replay_answers: bool | None = None
    replay_problem: str | None = None
    event_age_s: float | None = None
    lag_s: float | None = None
    """From the engine's timestamp to its last event applied."""
    address: str | None = None
    health: str | None = None
    sent: int = 0
    """Requests that were sent there."""
    in_flight: int | None = None
    prefill_tokens: int | None = None
    """In flight, and still to be computed."""
    waiting: int | None = None
    running: int | None = None
    kv_usage: float | None = None
    """Share of its KV blocks that running requests use."""
    gpu_blocks: int | None = None
    report_age_s: float | None = None

    @property
    def troubled(self) -> bool:
        """Whether something is wrong with it."""
        return self.state == "stale" or self.health not in (None, "healthy")


class ServiceShown(msgspec.Struct, frozen=True, kw_only=True):
    """What this process is."""

    version: str
    core: str
    core_problem: str | None
    """Why it is the slow one, where nobody asked for that."""
    keys_mode: str
    block_size_tokens: int
    routed: bool
    """It routes requests, and does not only answer questions."""
    engines_named: bool
    """Engines' event ports are named, or they may connect."""
    worker: str | None
    """Which of several processes this is: "0 of 4"."""
    worker_starts: int
    api_ports: tuple[int, ...]
    """Of all workers."""


class Limits(msgspec.Struct, frozen=True):
    """Bounds that something may reach."""

    blocks_max: int
    bytes_max: int
    queue_frames: int


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is looked at for problems."""

    service: ServiceShown
    ready: bool
    not_ready_reason: str
    rows: tuple[EngineRow, ...]
    index: IndexStats
    limits: Limits
    grown: Mapping[str, float]
    """By how much counters grew of late: see :mod:`kvatlas.serve.dashboard.sampler`."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is wrong, and what to do."""

    id: str
    severity: str
    """error: it does not work. warning: it works worse. info: worth knowing."""
    title: str
    meaning: str
    remedy: str
    engines: tuple[str, ...] = ()
    """Some of those that it is about."""
    engines_count: int = 0
    since_s: float = 0.0
    """Seconds since the epoch: when it was first seen."""


class FleetTotals(msgspec.Struct, frozen=True, kw_only=True):
    """All engines together."""

    engines: int
    by_state: Mapping[str, int]
    by_health: Mapping[str, int]
    in_flight: int
    waiting: int
    running: int
    lag_s_max: float | None


class Recent(msgspec.Struct, frozen=True, kw_only=True):
    """The last five minutes."""

    seconds: float
    requests: float
    prompt_tokens: float
    saved_tokens: float
    saved_told: bool
    """Saved tokens are those that engines told; else those predicted."""
    ttft_p50_s: float | None
    ttft_p90_s: float | None


class HolderShown(msgspec.Struct, frozen=True):
    """Who holds a prefix."""

    pod: str
    tier: Tier
    stale: bool


class PrefixShown(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the tree of prefixes."""

    id: int
    parent: int | None
    model: str
    key: str
    start_tokens: int
    end_tokens: int
    requests: float
    saved_tokens: float
    """Tokens of it that requests of late found cached at the best holder."""
    holders: tuple[HolderShown, ...]
    """Some of those who hold its last block."""
    holders_count: int


class FleetShown(msgspec.Struct, frozen=True, kw_only=True):
    """All but history and rows: the same for everybody who looks."""

    at_s: float
    service: ServiceShown
    ready: bool
    totals: FleetTotals
    index: IndexStats
    limits: Limits
    recent: Recent
    problems: tuple[Problem, ...]
    prefixes: tuple[PrefixShown, ...]
    prompts_matched: bool
    """Any prompt was matched with the index; else there can be no prefixes."""
    decisions: tuple[DecisionShown, ...]
