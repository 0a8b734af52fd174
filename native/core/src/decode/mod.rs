//! Payload bytes to events: vLLM's and SGLang's formats, as `kvatlas.ingest.decode` reads them.
//!
//! Strict: a payload is read here only if the Python decoder reads the same events of it and finds no fault. Whatever is not
//! certain is [`Unusual`], and the caller gives that payload to the Python decoder, which knows how to be lenient and what to
//! say of a fault. So a rare oddity costs time, never an answer.

use crate::events::Batch;
use reader::Reader;

mod event;
mod extras;
mod fields;
mod reader;
mod tokens;

#[cfg(test)]
mod tests;

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

// As the defaults of `kvatlas.ingest.decode.limits.DecodeLimits`, which says what each is for.
const PAYLOAD_BYTES_MAX: usize = 64 << 20;
const EVENTS_MAX: usize = 1 << 18;
const HASHES_PER_EVENT_MAX: usize = 1 << 20;
const TOKENS_PER_EVENT_MAX: usize = 1 << 23;
const BLOCK_SIZE_TOKENS_MAX: u32 = 1 << 20;
const EXTRAS_PER_PAYLOAD_MAX: usize = 1 << 18;
const EXTRA_BYTES_MAX: usize = 64 << 10;
const TEXT_CHARS_MAX: usize = 4096;

const DP_RANK_MAX: u32 = 0xFFFF;

/// Read a payload `[timestamp, [events], rank]` into `batch` (emptied first; unspecified after an error).
///
/// Memory follows the payload's size, whatever lengths it declares: about 16 bytes for each of its bytes at most, and 100 for
/// each of its extras, whose number is limited.
pub fn decode(payload: &[u8], wire: Wire, batch: &mut Batch) -> Result<(), Unusual> {
    batch.clear();
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(Unusual);
    }
    let mut reader = Reader::new(payload);
    let count = reader.array()?;
    if count < 2 {
        return Err(Unusual);
    }
    batch.timestamp_s = reader.time()?;
    let events = reader.array()?;
    if events > EVENTS_MAX {
        return Err(Unusual);
    }
    let mut extras_left = EXTRAS_PER_PAYLOAD_MAX;
    for _ in 0..events {
        let event = event::read(&mut reader, wire, batch, &mut extras_left)?;
        batch.events.push(event);
    }
    if count > 2 {
        batch.dp_rank = reader.int_or_nil()?.map(|rank| fields::at_most(rank, DP_RANK_MAX)).transpose()?;
    }
    for _ in 3..count {
        reader.skip()?;
    }
    reader.end()
}
