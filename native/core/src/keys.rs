//! Block keys: a 64-bit chained hash over parent, token ids and extra keys. As `kvatlas.keys`, bit for bit.

use crate::events::Extra;
use xxhash_rust::xxh3::xxh3_64;

mod cbor;
pub mod chain;
mod llmd;

/// Ours: 64 bits chained from model, tokens and extra keys; comparable across pods.
pub type BlockKey = u64;

/// Where a chain of tokens stands: the last key, and the tokens and extras after it that do not fill a block yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainEnd {
    /// The last key, or the root.
    pub key: BlockKey,
    /// Tokens after it.
    pub pending: Box<[u32]>,
    /// Extras of those, offsets from the first of them.
    pub extras: Box<[Extra]>,
}

impl ChainEnd {
    /// An end with nothing left over.
    pub fn at(key: BlockKey) -> Self {
        Self { key, pending: Box::default(), extras: Box::default() }
    }
}

/// What the key of a block is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Ours. As `kvatlas.keys.chain`.
    #[default]
    Kvatlas,
    /// llm-d's: FNV-1a-64 over canonical CBOR. As `kvatlas.keys.llmd`.
    LlmdCborFnv,
    /// llm-d's other one: XXH64.
    LlmdXxh64,
    /// The engine's own hash, made with this algorithm. As `kvatlas.keys.engine`.
    Engine(Box<str>),
}

const ENGINE: &str = "engine ";

impl Mode {
    /// A mode by its [`Mode::name`].
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "kvatlas" => Some(Self::Kvatlas),
            "llmd-cbor-fnv" => Some(Self::LlmdCborFnv),
            "llmd-xxh64" => Some(Self::LlmdXxh64),
            _ => name.strip_prefix(ENGINE).filter(|algorithm| !algorithm.is_empty()).map(|name| Self::Engine(name.into())),
        }
    }

    /// What it is called: by callers, and in snapshots.
    pub fn name(&self) -> String {
        match self {
            Self::Kvatlas => "kvatlas".to_owned(),
            Self::LlmdCborFnv => "llmd-cbor-fnv".to_owned(),
            Self::LlmdXxh64 => "llmd-xxh64".to_owned(),
            Self::Engine(algorithm) => format!("{ENGINE}{algorithm}"),
        }
    }

    /// Whether an item that began before a block can be one of its extras.
    pub(crate) fn has_earlier_extras(&self) -> bool {
        matches!(self, Self::LlmdCborFnv | Self::LlmdXxh64)
    }
}

/// How a deployment computes block keys.
#[derive(Clone, Debug)]
pub struct KeySchema {
    /// Tokens of an index block.
    pub block_size_tokens: usize,
    /// Part of every root.
    pub seed: Box<str>,
    /// What a key is.
    pub mode: Mode,
}

impl KeySchema {
    /// Whether the key of a block is what its engine calls it, so that nothing else needs to be known of it.
    #[inline]
    pub fn keys_are_hashes(&self) -> bool {
        matches!(self.mode, Mode::Engine(_))
    }

    /// The start of every chain of a model; an adapter's name stands in for its model's. The name is UTF-8 (or what Python's
    /// `surrogatepass` makes of it). Where keys are hashes it means nothing.
    pub fn root(&self, model_or_adapter: &[u8]) -> BlockKey {
        match self.mode {
            Mode::Kvatlas | Mode::Engine(_) => self.own_root(model_or_adapter),
            Mode::LlmdCborFnv => llmd::cbor_fnv_root(self.seed.as_bytes(), model_or_adapter),
            Mode::LlmdXxh64 => llmd::xxh64_root(self.seed.as_bytes(), model_or_adapter),
        }
    }

    fn own_root(&self, model_or_adapter: &[u8]) -> BlockKey {
        let seed = self.seed.as_bytes();
        let mut content = Vec::with_capacity(13 + seed.len() + model_or_adapter.len());
        content.extend_from_slice(b"kvatlas/1");
        content.extend_from_slice(&(seed.len() as u32).to_le_bytes());
        content.extend_from_slice(seed);
        content.extend_from_slice(model_or_adapter);
        xxh3_64(&content)
    }

    /// The key of one whole block with no extras, after `parent`.
    #[inline]
    pub fn next_key(&self, parent: BlockKey, tokens: &[u32], content: &mut Vec<u8>) -> BlockKey {
        match self.mode {
            Mode::Kvatlas | Mode::Engine(_) => {}
            Mode::LlmdCborFnv => return llmd::cbor_fnv(parent, tokens, &cbor::NULL, content),
            Mode::LlmdXxh64 => return llmd::xxh64(parent, tokens, &[], content),
        }
        content.resize(8 + 4 * tokens.len(), 0);
        content[..8].copy_from_slice(&parent.to_le_bytes());
        for (bytes, token) in content[8..].chunks_exact_mut(4).zip(tokens) {
            bytes.copy_from_slice(&token.to_le_bytes());
        }
        xxh3_64(content)
    }

    /// Append the keys of the whole blocks of `tokens` after `parent`; a partial last block has none.
    pub fn keys_after(&self, parent: BlockKey, tokens: &[u32], keys: &mut Vec<BlockKey>) {
        let mut content = Vec::with_capacity(8 + 4 * self.block_size_tokens);
        let mut key = parent;
        for block in tokens.chunks_exact(self.block_size_tokens) {
            key = self.next_key(key, block, &mut content);
            keys.push(key);
        }
    }

    /// Append `tokens` to a chain: push the keys of the blocks that they complete, return the new end.
    ///
    /// Offsets of `extras` count from the first of `tokens`; one before or behind them belongs to no block here (llm-d's: an
    /// image that began before them is part of all blocks that they complete).
    pub fn extend(&self, end: &ChainEnd, tokens: &[u32], extras: &[Extra], keys: &mut Vec<BlockKey>) -> ChainEnd {
        let size = self.block_size_tokens;
        let left_over = end.pending.len() as i64;
        let given = tokens.len() as i64;
        if left_over == 0 && end.extras.is_empty() && extras.is_empty() && tokens.len().is_multiple_of(size) {
            let before = keys.len();
            self.keys_after(end.key, tokens, keys);
            return ChainEnd::at(keys[before..].last().copied().unwrap_or(end.key));
        }
        if self.mode.has_earlier_extras() {
            return llmd::extend(self, end, tokens, extras, keys);
        }
        let all: Vec<u32> = end.pending.iter().chain(tokens).copied().collect();
        let mut here: Vec<Extra> = end.extras.to_vec();
        here.extend(
            extras
                .iter()
                .filter(|extra| (0..given).contains(&extra.offset_tokens))
                .map(|extra| Extra { offset_tokens: extra.offset_tokens + left_over, ..extra.clone() }),
        );
        here.sort();
        let mut content = Vec::with_capacity(8 + 4 * size);
        let mut key = end.key;
        let mut taken = 0;
        let blocks = all.chunks_exact(size);
        let rest = blocks.remainder().to_vec();
        let mut cut = 0;
        for block in blocks {
            content.clear();
            content.extend_from_slice(&key.to_le_bytes());
            push_tokens(&mut content, block);
            while taken < here.len() && here[taken].offset_tokens < (cut + size) as i64 {
                push_extra(&mut content, &here[taken], cut as i64);
                taken += 1;
            }
            key = xxh3_64(&content);
            keys.push(key);
            cut += size;
        }
        let left = here.drain(taken..).map(|extra| Extra { offset_tokens: extra.offset_tokens - cut as i64, ..extra });
        ChainEnd { key, extras: left.collect(), pending: rest.into() }
    }
}

#[inline]
fn push_tokens(content: &mut Vec<u8>, tokens: &[u32]) {
    for token in tokens {
        content.extend_from_slice(&token.to_le_bytes());
    }
}

fn push_extra(content: &mut Vec<u8>, extra: &Extra, block_start: i64) {
    content.extend_from_slice(&((extra.offset_tokens - block_start) as u32).to_le_bytes());
    content.extend_from_slice(&(extra.kind.len() as u32).to_le_bytes());
    content.extend_from_slice(extra.kind.as_bytes());
    content.extend_from_slice(&(extra.value.len() as u32).to_le_bytes());
    content.extend_from_slice(&extra.value);
}
