//! What an engine is like. As `kvatlas.sim.costs` and `kvatlas.sim.engines`, which say what the fields mean.

/// Seconds of one step, as a sum.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Costs {
    pub step_s: f64,
    pub prefill_token_s: f64,
    pub prefill_context_s: f64,
    pub decode_request_s: f64,
    pub decode_context_s: f64,
}

impl Costs {
    /// How long a step takes. The order of the operations is part of the specification: floats are to be the same everywhere.
    pub fn step_seconds(&self, work: StepWork) -> f64 {
        self.step_s
            + self.prefill_token_s * work.prompt_tokens as f64
            + self.prefill_context_s * (work.prompt_pairs as f64 / 2.0)
            + self.decode_request_s * work.decodes as f64
            + self.decode_context_s * work.decode_context as f64
    }
}

/// What a step computes.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepWork {
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// The sum of n (2c + n), for each chunk of n tokens behind c.
    pub prompt_pairs: u64,
    /// Requests that get their next token.
    pub decodes: u64,
    /// What these have in the cache.
    pub decode_context: u64,
}

/// Memory below the GPU's.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct TierSpec {
    pub name: Box<str>,
    pub blocks: usize,
    pub load_block_s: f64,
    pub latency_s: f64,
}

/// One engine.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct EngineSpec {
    pub costs: Costs,
    pub gpu_blocks: u32,
    pub block_size_tokens: u64,
    pub step_tokens_max: u64,
    pub running_max: usize,
    pub prefix_caching: bool,
    pub tiers: Vec<TierSpec>,
}

impl EngineSpec {
    /// How many blocks so many tokens need.
    pub fn blocks_for(&self, tokens: u64) -> usize {
        tokens.div_ceil(self.block_size_tokens) as usize
    }

    /// A tier as events name it.
    pub fn medium(&self, tier: usize) -> &str {
        if tier == 0 { "GPU" } else { &self.tiers[tier - 1].name }
    }

    /// How many blocks so many tokens fill.
    pub fn full_blocks(&self, tokens: u64) -> usize {
        (tokens / self.block_size_tokens) as usize
    }
}
