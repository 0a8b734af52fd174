//! What a step did to a cache, as an engine publishes it. As `kvatlas.sim.frame.Frame`, byte for byte.

use crate::jobs::Job;
use crate::spec::EngineSpec;
use std::ops::Range;

/// Events, written as msgpack one after the other until they are published.
#[derive(Default)]
pub struct Frame {
    events: usize,
    written: Vec<u8>,
    /// Keys that left a tier one after the other, and the tier: they become one event.
    removed: Vec<u64>,
    removed_from: usize,
}

impl Frame {
    /// A job's blocks are in a tier.
    pub fn stored(&mut self, spec: &EngineSpec, job: &Job, blocks: Range<usize>, tier: usize) {
        self.end_removal(spec);
        self.events += 1;
        let size = spec.block_size_tokens as usize;
        let tokens = job.token_ids.get(blocks.start * size..blocks.end * size).unwrap_or_default();
        let into = &mut self.written;
        array(into, 7);
        text(into, "BlockStored");
        integers(into, &job.keys[blocks.clone()]);
        match blocks.start {
            0 => into.push(NIL),
            start => integer(into, job.keys[start - 1]),
        }
        integers(into, tokens);
        integer(into, spec.block_size_tokens);
        into.push(NIL); // no adapter
        text(into, spec.medium(tier));
    }

    /// Keys are not in a tier any more.
    pub fn removed(&mut self, spec: &EngineSpec, keys: &[u64], tier: usize) {
        if self.removed_from != tier {
            self.end_removal(spec);
            self.removed_from = tier;
        }
        self.removed.extend_from_slice(keys);
    }

    /// The payload of all events since the last one; None: there were none.
    pub fn take(&mut self, spec: &EngineSpec, at_s: f64) -> Option<Vec<u8>> {
        self.end_removal(spec);
        if self.events == 0 {
            return None;
        }
        let mut payload = Vec::with_capacity(16 + self.written.len());
        array(&mut payload, 2);
        payload.push(FLOAT);
        payload.extend_from_slice(&at_s.to_be_bytes());
        array(&mut payload, std::mem::take(&mut self.events));
        payload.append(&mut self.written);
        Some(payload)
    }

    fn end_removal(&mut self, spec: &EngineSpec) {
        if self.removed.is_empty() {
            return;
        }
        self.events += 1;
        let into = &mut self.written;
        array(into, 3);
        text(into, "BlockRemoved");
        integers(into, &self.removed);
        self.removed.clear();
        text(into, spec.medium(self.removed_from));
    }
}

const NIL: u8 = 0xc0;
const FLOAT: u8 = 0xcb;
const INTEGER_BYTES_MAX: usize = 9;

fn array(into: &mut Vec<u8>, items: usize) {
    match items {
        0..=15 => into.push(0x90 | items as u8),
        16..=0xffff => {
            into.push(0xdc);
            into.extend_from_slice(&(items as u16).to_be_bytes());
        }
        _ => {
            into.push(0xdd);
            into.extend_from_slice(&(items as u32).to_be_bytes());
        }
    }
}

fn integer(into: &mut Vec<u8>, value: u64) {
    let mut bytes = [0; INTEGER_BYTES_MAX];
    let end = put(&mut bytes, value);
    into.extend_from_slice(&bytes[..end]);
}

/// An array of integers: nearly all of what is written.
fn integers<T: Copy + Into<u64>>(into: &mut Vec<u8>, values: &[T]) {
    array(into, values.len());
    let mut end = into.len();
    into.resize(end + (1 + size_of::<T>()) * values.len() + INTEGER_BYTES_MAX, 0); // as much as they may need
    for &value in values {
        let place = into[end..].first_chunk_mut().expect("there is room for one more");
        end += put(place, value.into());
    }
    into.truncate(end);
}

/// Write an integer in as few bytes as it needs. How many.
#[inline(always)]
fn put(into: &mut [u8; INTEGER_BYTES_MAX], value: u64) -> usize {
    match value {
        0..=0x7f => {
            into[0] = value as u8;
            1
        }
        0x80..=0xff => {
            into[..2].copy_from_slice(&[0xcc, value as u8]);
            2
        }
        0x100..=0xffff => {
            into[0] = 0xcd;
            into[1..3].copy_from_slice(&(value as u16).to_be_bytes());
            3
        }
        0x1_0000..=0xffff_ffff => {
            into[0] = 0xce;
            into[1..5].copy_from_slice(&(value as u32).to_be_bytes());
            5
        }
        _ => {
            into[0] = 0xcf;
            into[1..9].copy_from_slice(&value.to_be_bytes());
            9
        }
    }
}

/// A name of at most 65,535 bytes.
fn text(into: &mut Vec<u8>, value: &str) {
    match value.len() {
        bytes @ 0..=31 => into.push(0xa0 | bytes as u8),
        bytes @ 32..=255 => into.extend_from_slice(&[0xd9, bytes as u8]),
        bytes => {
            into.push(0xda);
            into.extend_from_slice(&(bytes as u16).to_be_bytes());
        }
    }
    into.extend_from_slice(value.as_bytes());
}
