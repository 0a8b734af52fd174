//! Payload bytes to events.

use crate::events::Batch;

/// Whose order of positional fields an array event has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// vLLM's.
    Vllm,
    /// SGLang's.
    Sglang,
}

/// A payload that is not read here: damaged, hostile, or of a shape that no known engine sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unusual;

/// Read a payload into `batch` (emptied first).
pub fn decode(payload: &[u8], wire: Wire, batch: &mut Batch) -> Result<(), Unusual> {
    let _ = (payload, wire, batch);
    Err(Unusual)
}
