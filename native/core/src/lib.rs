//! The hot work of kvatlas, without Python in it: payload bytes to events, tokens to block keys, the index, scores.
//!
//! `src/kvatlas/index/reference.py` and `src/kvatlas/keys/` are the specification: what this crate answers, they answer.
//!
//! ```text
//! payload -> decode -> events -> index (turns of writers, in steps) -> state -> blocks + holder sets
//! tokens  -> keys   -> find (runs of equal holder sets) -> score
//! ```

pub mod blocks;
pub mod decode;
pub mod events;
pub mod find;
pub mod history;
pub mod index;
pub mod irregular;
pub mod keys;
mod memory;
mod pages;
pub mod pieces;
pub mod promises;
pub mod recency;
pub mod report;
pub mod score;
mod secret;
pub mod sets;
pub mod shared;
pub mod slots;
pub mod snapshot;
pub mod state;
pub mod stream;
pub mod table;
mod victims;

/// A size; a small one where a fuzzer looks for what happens when it is reached.
const fn size(usual: usize, fuzzed: usize) -> usize {
    if cfg!(fuzzing) { fuzzed } else { usual }
}
