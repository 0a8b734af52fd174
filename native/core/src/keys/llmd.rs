//! llm-d's block keys. As `kvatlas.keys.llmd`, which says what belongs to a block beside its tokens.

use super::{BlockKey, ChainEnd, KeySchema, Mode, cbor};
use crate::events::Extra;
use std::borrow::Cow;
use xxhash_rust::xxh64::xxh64 as digest;

/// A kind of extra that belongs to every block it touches.
const ITEM: &str = "mm";
/// Kinds whose values are text.
const SALT: &str = "salt";

pub fn fnv1a_64(content: &[u8]) -> u64 {
    content.iter().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3))
}

/// One block; `extra` is CBOR.
pub fn cbor_fnv(parent: BlockKey, tokens: &[u32], extra: &[u8], content: &mut Vec<u8>) -> BlockKey {
    content.clear();
    content.push(cbor::TRIPLE);
    cbor::unsigned(content, parent);
    cbor::tokens(content, tokens);
    content.extend_from_slice(extra);
    fnv1a_64(content)
}

pub fn cbor_fnv_root(seed: &[u8], model: &[u8]) -> BlockKey {
    let mut content = vec![cbor::TRIPLE];
    cbor::unsigned(&mut content, fnv1a_64(seed));
    content.extend_from_slice(&cbor::NULL);
    cbor::text(&mut content, model);
    fnv1a_64(&content)
}

/// One block; `extra` is each value with its length before it.
pub fn xxh64(parent: BlockKey, tokens: &[u32], extra: &[u8], content: &mut Vec<u8>) -> BlockKey {
    content.clear();
    content.extend_from_slice(&parent.to_le_bytes());
    super::push_tokens(content, tokens);
    content.extend_from_slice(extra);
    digest(content, 0)
}

pub fn xxh64_root(seed: &[u8], model: &[u8]) -> BlockKey {
    let mut content = digest(seed, 0).to_le_bytes().to_vec();
    with_length(&mut content, model);
    digest(&content, 0)
}

fn with_length(out: &mut Vec<u8>, value: &[u8]) {
    out.extend_from_slice(&(value.len() as u64).to_le_bytes());
    out.extend_from_slice(value);
}

/// As [`KeySchema::extend`].
pub fn extend(schema: &KeySchema, end: &ChainEnd, tokens: &[u32], extras: &[Extra], keys: &mut Vec<BlockKey>) -> ChainEnd {
    let size = schema.block_size_tokens;
    let before = end.pending.len() as i64;
    let given = tokens.len() as i64;
    let all: Vec<u32> = end.pending.iter().chain(tokens).copied().collect();
    let total = all.len() as i64;
    let mut placed: Vec<(Extra, i64, i64)> = Vec::new();
    for extra in &end.extras {
        placed.push((extra.clone(), 0, before)); // touches only what is pending
    }
    for extra in extras {
        let at = extra.offset_tokens.saturating_add(before);
        let here = Extra { offset_tokens: at, ..extra.clone() };
        let touches = if &*extra.kind == ITEM { (before.max(at), total) } else { (at, at.saturating_add(1)) };
        if extra.offset_tokens < given && (touches.0 >= before) {
            placed.push((here, touches.0, touches.1));
        }
    }
    placed.sort_by(|one, other| order(&one.0).cmp(&order(&other.0)));
    let mut content = Vec::new();
    let mut key = end.key;
    let mut cut = 0;
    let blocks = all.chunks_exact(size);
    let rest: Box<[u32]> = blocks.remainder().into();
    for block in blocks {
        let here = touching(&placed, cut, cut + size as i64);
        let values: Vec<Cow<[u8]>> = here.map(value).collect();
        key = match schema.mode {
            Mode::LlmdXxh64 => {
                let mut extra = Vec::new();
                values.iter().for_each(|value| with_length(&mut extra, value));
                xxh64(key, block, &extra, &mut content)
            }
            _ => cbor_fnv(key, block, &hashes(&values), &mut content),
        };
        keys.push(key);
        cut += size as i64;
    }
    let left = touching(&placed, cut, total);
    let left = left.map(|extra| Extra { offset_tokens: extra.offset_tokens - cut, ..extra.clone() });
    ChainEnd { key, extras: left.collect(), pending: rest }
}

/// Items by where they start, then what is no item.
fn order(extra: &Extra) -> (bool, &Extra) {
    (&*extra.kind != ITEM, extra)
}

/// The extras of some tokens, each once.
fn touching(placed: &[(Extra, i64, i64)], start: i64, end: i64) -> impl Iterator<Item = &Extra> {
    let mut here: Vec<&Extra> =
        placed.iter().filter(|(_, from, to)| *from < end && start < *to).map(|(extra, ..)| extra).collect();
    here.dedup();
    here.into_iter()
}

fn value(extra: &Extra) -> Cow<'_, [u8]> {
    if matches!(&*extra.kind, ITEM | SALT) {
        return Cow::Borrowed(&extra.value);
    }
    let mut hex = Vec::with_capacity(2 * extra.value.len());
    for byte in &extra.value {
        hex.extend([byte >> 4, byte & 15].map(|digit| b"0123456789abcdef"[digit as usize]));
    }
    Cow::Owned(hex)
}

fn hashes(values: &[Cow<[u8]>]) -> Vec<u8> {
    if values.is_empty() {
        return cbor::NULL.to_vec();
    }
    let mut out = Vec::new();
    cbor::array(&mut out, values.len());
    for value in values {
        cbor::map_of_one(&mut out, b"Hash");
        cbor::text(&mut out, value);
    }
    out
}
