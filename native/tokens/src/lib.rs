//! Texts to tokens: Hugging Face's tokenizers, with what is known of texts seen before. No Python in it.
//!
//! `kvatlas.tokens` is the specification: its tokenizers wheel says what a text's tokens are, its `seams.py` proves where a
//! text may be cut.

mod encoder;
mod known;
mod seams;
mod segments;

pub use encoder::{Encoder, Encoding, Failure};
pub use known::{Found, KnownText, Stats};
pub use seams::Seams;
pub use segments::{Segments, SegmentsHeld};
