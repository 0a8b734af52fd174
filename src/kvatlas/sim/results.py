"""What a run showed."""

from __future__ import annotations

import msgspec


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How values lie, in seconds. Quantiles are exact within 1 %. All 0 where there was none."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    max: float = 0.0


class EngineResult(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's share."""

    name: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    busy: float
    """Share of the run that it spent in steps. This, and what follows, is also of requests that did not pass the router."""
    waiting_mean: float
    """Requests in its queue, over time."""
    running_mean: float
    kv_usage_mean: float
    preemptions: int


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet in one of the equal parts of a run."""

    from_s: float
    arrived: int
    finished: int
    ttft_mean_s: float
    """Of the requests whose first token came in this part."""
    cached_share: float
    waiting: int
    """Requests in all engines' queues at its end."""
    running: int
    output_tokens: int


class PhaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one part of a workload (``Arrival.phase``): a stage of a ladder, its warm-up."""

    name: str
    from_s: float
    """When the first of them arrived."""
    duration_s: float
    """From then to the last answer of one of them."""
    arrived: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ttft: Spread = Spread()
    tpot: Spread = Spread()

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s if self.duration_s else 0.0

    @property
    def hit_ratio(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """One policy under one workload."""

    policy: str
    workload: str
    seed: int
    scale: float = 1.0
    """Arrivals were so many times as dense as the workload has them."""
    label: str = ""
    """What else was varied, as ``name=value``."""
    engines: tuple[EngineResult, ...] = ()
    arrived: int = 0
    finished: int = 0
    refused: int = 0
    """Longer than any engine's memory."""
    gave_up: int = 0
    """Their clients went before the first token."""
    cancelled: int = 0
    """Their clients went after it, and before the last one."""
    foreign: int = 0
    """Requests that reached engines without passing the router. They are in no figure but this and engines' loads."""
    duration_s: float = 0.0
    """Virtual, from the first arrival to the last answer."""
    wall_s: float = 0.0
    """How long the simulation took."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    loaded_tokens: int = 0
    """Of these, those that slower tiers had."""
    output_tokens: int = 0
    preemptions: int = 0
    ttft: Spread = Spread()
    tpot: Spread = Spread()
    """Seconds for each output token but the first."""
    e2e: Spread = Spread()
    queue: Spread = Spread()
    """From arrival to the first step."""
    moments: tuple[Moment, ...] = ()
    phases: tuple[PhaseResult, ...] = ()
    """In the order of their first arrivals; none where the workload has no parts."""
    notes: tuple[str, ...] = ()
    """What was degraded: events lost, streams stale, decisions without tokens."""

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s if self.duration_s else 0.0

    @property
    def requests_per_s(self) -> float:
        return self.finished / self.duration_s if self.duration_s else 0.0

    @property
    def hit_ratio(self) -> float:
        """Share of prompt tokens that were not computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def imbalance(self) -> float:
        """The busiest engine's tokens computed over the mean's; 1 is even."""
        computed = [one.prompt_tokens - one.cached_tokens + one.output_tokens for one in self.engines]
        return max(computed) * len(computed) / sum(computed) if sum(computed) else 1.0
