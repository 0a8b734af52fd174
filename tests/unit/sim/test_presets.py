"""Presets: what is derived follows from what was published."""

from __future__ import annotations

import pytest

from kvatlas.sim.checks import check_spec
from kvatlas.sim.presets import H100, H200, L4, LLAMA_3_1_8B, LLAMA_3_3_70B, PRESETS, QWEN3_32B, derive


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_an_engine_and_names_its_sources(name: str) -> None:
    preset = PRESETS[name]
    check_spec(preset.spec)
    assert preset.name == name
    assert preset.source
    assert preset.spec.costs.step_s > 0
    assert preset.spec.costs.decode_context_s > 0


def test_the_memory_of_llm_ds_pods_is_as_published_and_as_derived() -> None:
    published = PRESETS["qwen3-32b-2xh100"].spec
    assert published.gpu_blocks * published.block_size_tokens == 307_328
    assert derive(QWEN3_32B, H100, 2).gpu_blocks * 16 == pytest.approx(307_328, rel=0.001)


def test_a_step_of_llama_on_h200_takes_as_long_as_vllms_benchmark_measured() -> None:
    """128 tokens for a batch of 8 behind prompts of 32: 0.833 s, and 2.078 s for 70B on four."""
    for model, gpus, measured_s in ((LLAMA_3_1_8B, 1, 0.833), (LLAMA_3_3_70B, 4, 2.078)):
        costs = derive(model, H200, gpus).costs
        steps_s = sum(costs.step_seconds(0, 0, 8, 8 * (32 + token)) for token in range(128))
        assert steps_s == pytest.approx(measured_s, rel=0.3)


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Llama-3.3-70B: does not fit into 1 x L4 24GB; take more of them"):
        derive(LLAMA_3_3_70B, L4)
