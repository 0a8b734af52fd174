"""What engines refuse to be told: ValueError that names the field, before anything changes."""

from __future__ import annotations

import math

from kvatlas.sim.engines import EngineSpec, Job

U64 = "Q"
U32 = "I"
BLOCK_SIZE_TOKENS_MAX = 1 << 16
TIER_NAME_MAX = 64
COUNT_MAX = (1 << 31) - 1
"""Of everything that is counted in a specification or a job: beyond what any engine has, and no sum of them is too large."""

FACTOR_MAX = 1e6
"""Of how many times as long an engine's steps may take."""


def check_spec(spec: EngineSpec) -> None:
    """Refuse an engine that could do no step, or would go back in time."""
    _whole("gpu_blocks", spec.gpu_blocks, 2)
    _whole("block_size_tokens", spec.block_size_tokens, 1, BLOCK_SIZE_TOKENS_MAX)
    _whole("step_tokens_max", spec.step_tokens_max, 1)
    _whole("running_max", spec.running_max, 1)
    for name in spec.costs.__struct_fields__:
        _seconds(f"costs.{name}", getattr(spec.costs, name))
    for number, tier in enumerate(spec.tiers):
        if not 1 <= len(tier.name) <= TIER_NAME_MAX:
            raise ValueError(f"tiers[{number}].name: expected 1 to {TIER_NAME_MAX} characters, got {tier.name!r:.80}")
        _whole(f"tiers[{number}].blocks", tier.blocks, 1)
        _seconds(f"tiers[{number}].load_block_s", tier.load_block_s)
        _seconds(f"tiers[{number}].latency_s", tier.latency_s)


def check_job(job: Job, spec: EngineSpec) -> None:
    """Refuse a job whose keys do not name all blocks that will be computed in full."""
    if not (1 <= job.prompt_tokens <= COUNT_MAX and 1 <= job.output_tokens <= COUNT_MAX):
        raise ValueError(f"job {job.id}: prompt_tokens and output_tokens: expected 1 to {COUNT_MAX} of each")
    if not -(1 << 63) <= job.id < 1 << 63:
        raise ValueError(f"job {job.id}: id: expected an integer of 64 bits")
    if job.keys.typecode != U64:
        raise ValueError(f"job {job.id}: keys: expected array('Q'), got array('{job.keys.typecode}')")
    full = computed_tokens(job) // spec.block_size_tokens
    if len(job.keys) < full:
        raise ValueError(
            f"job {job.id}: keys: expected {full} or more of blocks of {spec.block_size_tokens}, got {len(job.keys)}"
        )
    if job.tokens and (job.tokens.typecode != U32 or len(job.tokens) < full * spec.block_size_tokens):
        raise ValueError(
            f"job {job.id}: tokens: expected none, or array('I') with those of {full} blocks, "
            f"got array('{job.tokens.typecode}') with {len(job.tokens)}"
        )


def check_factor(factor: float) -> None:
    """Refuse to let steps take no time, or any."""
    if not 0 < factor <= FACTOR_MAX:
        raise ValueError(f"factor: expected more than 0, at most {FACTOR_MAX:g}, got {factor}; 1 is the speed of its costs")


def computed_tokens(job: Job) -> int:
    """Return how many tokens go through the model: the last one is only told."""
    return job.prompt_tokens + job.output_tokens - 1


def blocks_for(tokens: int, block_size_tokens: int) -> int:
    """Return how many blocks so many tokens need."""
    return -(-tokens // block_size_tokens)


def fits(job: Job, spec: EngineSpec) -> bool:
    """Whether an engine can ever run a job: its own one block left out, its memory holds all that is computed."""
    return blocks_for(computed_tokens(job), spec.block_size_tokens) <= spec.gpu_blocks - 1


def _whole(name: str, value: int, least: int, most: int = COUNT_MAX) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {value}")


def _seconds(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected seconds, 0 or more, got {value}")
