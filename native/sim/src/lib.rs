//! Simulated engines on a virtual clock: batches, blocks and tiers as vLLM 0.32 has them.
//!
//! `src/kvatlas/sim/reference.py` is the specification: what happens here happens there, at the same times to the last bit.
//! What differs is what a step costs. Jobs that only get their next token are [`steady`](steady::Steady): a step touches those
//! of them that need a block, fill one or finish, and no others.
//!
//! ```text
//! engines (the clock) -> engine (which jobs a step computes) -> memory (pool, tiers) -> frame (what it publishes)
//!                                       |-> steady (jobs that get a token with each step)
//! ```

pub mod engine;
pub mod engines;
mod frame;
pub mod jobs;
mod memory;
mod pool;
pub mod spec;
mod steady;
mod tier;
pub mod told;
