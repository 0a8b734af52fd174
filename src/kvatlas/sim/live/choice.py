"""Which engine an embedded engine simulates."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.presets import preset_spec
from kvatlas.sim.spec_file import read_spec

SMALL = EngineSpec(
    costs=EngineCosts(
        step_s=0.008,
        prefill_token_s=0.0008,
        prefill_context_s=2e-8,
        decode_request_s=0.0004,
        decode_context_s=1e-7,
    ),
    gpu_blocks=2048,
    step_tokens_max=2048,
    running_max=64,
)
"""No real one: slow enough for a laptop to run several beside each other, and for a cached prompt to be felt."""


def chosen_spec(preset: str, file: Path | None, gpu_blocks: int | None, block_size: int | None) -> EngineSpec:
    """Return a file's engine, or else a preset's, with these sizes where they are given. Raises ConfigError."""
    spec = preset_spec(preset, {"small": SMALL}) if file is None else read_spec(file)
    return msgspec.structs.replace(
        spec,
        gpu_blocks=spec.gpu_blocks if gpu_blocks is None else gpu_blocks,
        block_size_tokens=spec.block_size_tokens if block_size is None else block_size,
    )
