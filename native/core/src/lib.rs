//! The hot work of kvatlas, without Python in it: payload bytes to events, tokens to block keys, the index, scores.
//!
//! `src/kvatlas/index/reference.py` and `src/kvatlas/keys/` are the specification: what this crate answers, they answer.

pub mod decode;
pub mod events;
pub mod keys;
