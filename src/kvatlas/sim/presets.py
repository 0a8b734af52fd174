"""Engines of common models on common GPUs: published sizes, and costs derived from them.

Every cost is a size over a speed (``EngineCosts`` says what it is multiplied with):

    step_s             = bytes of the weights               / (GPUs * memory bandwidth * WEIGHTS_SHARE)
    prefill_token_s    = 2 * active parameters              / (GPUs * peak FLOP/s * compute share)
    prefill_context_s  = 2 * heads * layers * (width of keys + width of values) / (GPUs * peak FLOP/s * compute share)
    decode_request_s   = prefill_token_s: the same work for one token
    decode_context_s   = bytes of one token's keys and values / (GPUs * memory bandwidth * KV_SHARE)
    gpu_blocks         = (GPUs * (MEMORY_SHARE * memory - RESERVED_BYTES) - weights) / bytes of a block

Sizes of models and GPUs are published, each with its source. Shares of peaks are fitted to published measurements, as each
says; what follows from them, and from memory that nobody published, is derived. docs/simulator-engine.md has what they predict
beside what was measured.

The sum is a little pessimistic: a GPU reads weights while it computes. Not in it: what GPUs send each other, and that a mixture
of experts reads fewer weights for a small batch. Where such numbers matter, measure (``kvatlas calibrate``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from kvatlas.route.parameters import unknown_name
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec

GIB = 1 << 30

COMPUTE_SHARE = 0.5
"""Of the peak, for dense models: the upper end of the 30 to 50 % that prompts are said to reach
(zeroentropy.dev/concepts/mfu). Measured: 53 % with Qwen3-32B on an A100 with vLLM 0.11, 2,521 tokens/s
(docs.gpustack.ai, performance-lab/qwen3-32b/a100)."""
WEIGHTS_SHARE = 0.5
"""Of the bandwidth's peak, with all that a step costs anyway: fitted to vLLM's own benchmark, in which 128 tokens for a batch
of 8 took 833 ms with Llama 8B on H200 (51 %), and 2,078 ms with 70B on four (45 %).
(buildkite.com/vllm/performance-benchmark/builds/9515)"""
KV_SHARE = 0.9
"""Of the bandwidth's peak: fitted to 42 ms for each token of Qwen3-32B on two H100 with about 90 requests of 7,700 tokens each
(llm-d's report "X-70R-6kSys", precise-scheduling at 20 to 35 QPS). Its "ITL mean" is half of that, because inference-perf then
took the time of each line of the stream, of which every other one is empty: the p50 there is 0."""
MEMORY_SHARE = 0.9
"""vLLM's ``gpu_memory_utilization`` for many versions."""
RESERVED_BYTES = 3.65 * GIB
"""A GPU's for activations, CUDA graphs and the half GiB that a process does not get of what nvidia-smi shows: fitted, so that
Qwen3-32B on 2 H100 gets llm-d's 307,328 tokens."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU, by its data sheet; without sparsity."""

    name: str
    memory_bytes: float
    """What nvidia-smi shows; of A100 what PyTorch does, because nvidia-smi shows the 80 GiB that nobody gets."""
    bandwidth: float
    """Bytes a second."""
    flops_16: float
    """A second, 16 bits."""
    flops_8: float
    """A second, 8 bits; as 16 where the GPU has no faster ones."""
    step_tokens_max: int
    running_max: int
    """vLLM 0.32's defaults for a server on it (engine/arg_utils.py)."""
    source: str


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One model, as its card and its configuration say."""

    name: str
    parameters_active: float
    weight_bytes: float
    layers: int
    """Those that attend to everything: others keep a bounded window, which is not modelled."""
    heads: int
    key_width: int
    """Of one head, as prompts are computed."""
    value_width: int
    kv_bytes_token: float
    kv_shared_out: bool = True
    """Each GPU has its heads' part. False: each has all of it (a latent that all heads share)."""
    weights_8_bit: bool = False
    """It computes with 8 bits."""
    compute_share: float = COMPUTE_SHARE
    """Of the peak: mixtures of experts multiply smaller matrices, and reach less of it."""
    source: str


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """An engine, and where its numbers come from."""

    name: str
    model: str
    gpus: str
    spec: EngineSpec
    blocks: Literal["published", "derived"]
    """Where the size of the memory is from. Costs are derived in all presets, with the shares above."""
    source: str


A100 = Gpu(
    name="A100 80GB SXM",
    memory_bytes=79.3 * GIB,
    bandwidth=2.039e12,
    flops_16=312e12,
    flops_8=312e12,
    step_tokens_max=2048,
    running_max=256,
    source="NVIDIA A100 80GB data sheet",
)
H100 = Gpu(
    name="H100 80GB SXM",
    memory_bytes=79.65 * GIB,
    bandwidth=3.35e12,
    flops_16=989e12,
    flops_8=1979e12,
    step_tokens_max=8192,
    running_max=1024,
    source="NVIDIA H100 data sheet (half of its tensor figures, which are with sparsity; nvidia-smi: 81,559 MiB)",
)
H200 = Gpu(
    name="H200 141GB SXM",
    memory_bytes=140.4 * GIB,
    bandwidth=4.8e12,
    flops_16=989e12,
    flops_8=1979e12,
    step_tokens_max=8192,
    running_max=1024,
    source="NVIDIA H200 data sheet (half of its tensor figures, which are with sparsity; nvidia-smi: 143,771 MiB)",
)
L4 = Gpu(
    name="L4 24GB",
    memory_bytes=22.5 * GIB,
    bandwidth=0.3e12,
    flops_16=121e12,
    flops_8=242e12,
    step_tokens_max=2048,
    running_max=256,
    source="NVIDIA L4 data sheet (half of its tensor figures, which are with sparsity; nvidia-smi: 23,034 MiB)",
)


def _grouped_query(name: str, parameters: float, layers: int, heads: int, source: str) -> Model:
    """Return a dense model in 16 bits with 8 key-value heads 128 wide."""
    kv_bytes_token = 2 * layers * 8 * 128 * 2
    return Model(
        name=name,
        parameters_active=parameters,
        weight_bytes=2 * parameters,
        layers=layers,
        heads=heads,
        key_width=128,
        value_width=128,
        kv_bytes_token=kv_bytes_token,
        source=source,
    )


LLAMA_3_1_8B = _grouped_query("Llama-3.1-8B", 8.03e9, 32, 32, "arXiv:2407.21783, table 3; model card")
LLAMA_3_1_70B = _grouped_query("Llama-3.1-70B", 70.6e9, 80, 64, "arXiv:2407.21783, table 3; model card")
LLAMA_3_3_70B = _grouped_query("Llama-3.3-70B", 70.6e9, 80, 64, "model card: the architecture of Llama-3.1-70B")
QWEN3_32B = _grouped_query("Qwen3-32B", 32.8e9, 64, 64, "arXiv:2505.09388, table 1; model card")
GPT_OSS_120B = Model(
    name="gpt-oss-120b",
    parameters_active=5.1e9,
    weight_bytes=60.8 * GIB,
    layers=18,
    heads=64,
    key_width=64,
    value_width=64,
    kv_bytes_token=2 * 18 * 8 * 64 * 2,
    compute_share=0.28,
    source="arXiv:2508.10925 (60.8 GiB checkpoint; 36 layers, every other one with a window of 128 tokens); share of peak "
    "fitted to vLLM 0.10.2 with prompts of 4,000 tokens (docs.gpustack.ai, performance-lab/gpt-oss-120b/h100)",
)
DEEPSEEK_V3 = Model(
    name="DeepSeek-V3",
    parameters_active=37e9,
    weight_bytes=671e9,
    layers=61,
    heads=128,
    key_width=128 + 64,
    value_width=128,
    kv_bytes_token=61 * (512 + 64) * 2,
    kv_shared_out=False,
    weights_8_bit=True,
    compute_share=0.25,
    source="arXiv:2412.19437, section 4.2 (MLA: 512 + 64 values a token and layer, here in 16 bits); share of peak from 52,300 "
    "prompt tokens/s of 8 H100, SGLang with expert parallelism (lmsys.org/blog/2025-05-05-large-scale-ep)",
)


def derive(model: Model, gpu: Gpu, gpus: int = 1, *, gpu_tokens: int | None = None, block_size_tokens: int = 16) -> EngineSpec:
    """Return an engine by the formulas above. ``gpu_tokens``: what its memory holds, where that was published.

    ValueError where the model does not fit.
    """
    flops = gpus * (gpu.flops_8 if model.weights_8_bit else gpu.flops_16) * model.compute_share
    bandwidth = gpus * gpu.bandwidth
    kv_bytes = model.kv_bytes_token * (1 if model.kv_shared_out else gpus)
    if gpu_tokens is None:
        left = gpus * (MEMORY_SHARE * gpu.memory_bytes - RESERVED_BYTES) - model.weight_bytes
        gpu_tokens = int(left / kv_bytes)
        if gpu_tokens < block_size_tokens:
            raise ValueError(f"{model.name}: does not fit into {gpus} x {gpu.name}; take more of them")
    token_s = 2 * model.parameters_active / flops
    return EngineSpec(
        costs=EngineCosts(
            step_s=model.weight_bytes / (bandwidth * WEIGHTS_SHARE),
            prefill_token_s=token_s,
            prefill_context_s=2 * model.heads * model.layers * (model.key_width + model.value_width) / flops,
            decode_request_s=token_s,
            decode_context_s=kv_bytes / (bandwidth * KV_SHARE),
        ),
        gpu_blocks=gpu_tokens // block_size_tokens,
        block_size_tokens=block_size_tokens,
        step_tokens_max=gpu.step_tokens_max,
        running_max=gpu.running_max,
    )


def _preset(name: str, model: Model, gpu: Gpu, gpus: int = 1, gpu_tokens: int | None = None, source: str = "") -> Preset:
    return Preset(
        name=name,
        model=model.name,
        gpus=f"{gpus} x {gpu.name}",
        spec=derive(model, gpu, gpus, gpu_tokens=gpu_tokens),
        blocks="derived" if gpu_tokens is None else "published",
        source="; ".join(filter(None, (model.source, gpu.source, source))),
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _preset(
            "llama-3.1-8b-l4",
            LLAMA_3_1_8B,
            L4,
            gpu_tokens=40_208,
            source="40,208 tokens: example of kvplan, which plans vLLM's memory (pypi.org/project/kvplan)",
        ),
        _preset("llama-3.1-8b-a100", LLAMA_3_1_8B, A100),
        _preset("llama-3.1-8b-h100", LLAMA_3_1_8B, H100),
        _preset("llama-3.1-70b-4xh100", LLAMA_3_1_70B, H100, 4),
        _preset("llama-3.3-70b-4xh100", LLAMA_3_3_70B, H100, 4),
        _preset("llama-3.3-70b-2xh200", LLAMA_3_3_70B, H200, 2),
        _preset(
            "qwen3-32b-2xh100",
            QWEN3_32B,
            H100,
            2,
            gpu_tokens=307_328,
            source="307,328 tokens: llm-d's shared-prefix benchmark (llm-d.ai/blog/kvcache-wins-you-can-see)",
        ),
        _preset("gpt-oss-120b-h100", GPT_OSS_120B, H100),
        _preset("gpt-oss-120b-2xh100", GPT_OSS_120B, H100, 2),
        _preset("deepseek-v3-8xh200", DEEPSEEK_V3, H200, 8),
    )
}
"""By name."""


def preset_spec(name: str, others: Mapping[str, EngineSpec] | None = None) -> EngineSpec:
    """Return a preset's engine, or one of ``others``. ConfigError, of the option ``--preset``, for a name that nothing has."""
    found = {**(others or {}), **{preset.name: preset.spec for preset in PRESETS.values()}}
    if name not in found:
        raise unknown_name("--preset", "preset", name, list(found))
    return found[name]
