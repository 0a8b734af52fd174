"""What engines refuse to be told: ValueError that names the field, before anything changes."""

from __future__ import annotations

import math

from kvatlas.sim.engines import EngineSpec, Job

U64 = "Q"


def check_spec(spec: EngineSpec) -> None:
    """Refuse an engine that could do no step, or would go back in time."""
    _whole("gpu_blocks", spec.gpu_blocks, 2)
    _whole("block_size_tokens", spec.block_size_tokens, 1)
    _whole("step_tokens_max", spec.step_tokens_max, 1)
    _whole("running_max", spec.running_max, 1)
    for name in spec.costs.__struct_fields__:
        _seconds(f"costs.{name}", getattr(spec.costs, name))
    for number, tier in enumerate(spec.tiers):
        _whole(f"tiers[{number}].blocks", tier.blocks, 1)
        _seconds(f"tiers[{number}].load_block_s", tier.load_block_s)
        _seconds(f"tiers[{number}].latency_s", tier.latency_s)


def check_job(job: Job, spec: EngineSpec) -> None:
    """Refuse a job whose keys do not name all blocks that will be computed in full."""
    if job.prompt_tokens < 1 or job.output_tokens < 1:
        raise ValueError(f"job {job.id}: prompt_tokens and output_tokens: expected 1 or more of each")
    if job.keys.typecode != U64:
        raise ValueError(f"job {job.id}: keys: expected array('Q'), got array('{job.keys.typecode}')")
    full = computed_tokens(job) // spec.block_size_tokens
    if len(job.keys) < full:
        raise ValueError(
            f"job {job.id}: keys: expected {full} or more of blocks of {spec.block_size_tokens}, got {len(job.keys)}"
        )


def computed_tokens(job: Job) -> int:
    """Return how many tokens go through the model: the last one is only told."""
    return job.prompt_tokens + job.output_tokens - 1


def blocks_for(tokens: int, block_size_tokens: int) -> int:
    """Return how many blocks so many tokens need."""
    return -(-tokens // block_size_tokens)


def fits(job: Job, spec: EngineSpec) -> bool:
    """Whether an engine can ever run a job: its own one block left out, its memory holds all that is computed."""
    return blocks_for(computed_tokens(job), spec.block_size_tokens) <= spec.gpu_blocks - 1


def _whole(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")


def _seconds(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected seconds, 0 or more, got {value}")
