//! Chains of whole blocks whose extras are serialized already: what engines and llm-d hash. As `kvatlas.keys.engine_hashes`.

use super::{BlockKey, cbor, llmd};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_128;

/// How a block's hash is made of its parent's, its tokens and its extras.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// SHA-256 of CBOR; the whole digest is chained.
    Sha256Cbor,
    /// XXH3-128 of CBOR; the whole digest is chained.
    Xxh3Cbor,
    /// SHA-256 of CBOR, of which the last 64 bits are kept, and chained as a number.
    Sha256Cbor64,
    /// As [`super::Mode::LlmdCborFnv`].
    LlmdCborFnv,
    /// As [`super::Mode::LlmdXxh64`].
    LlmdXxh64,
}

impl Recipe {
    /// A recipe by its name: an engine's algorithm, or a mode of keys.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "sha256_cbor" => Self::Sha256Cbor,
            "xxhash_cbor" => Self::Xxh3Cbor,
            "sha256_cbor_64bit" => Self::Sha256Cbor64,
            "llmd-cbor-fnv" => Self::LlmdCborFnv,
            "llmd-xxh64" => Self::LlmdXxh64,
            _ => return None,
        })
    }

    /// Bytes of what is chained. A root may have another length where it is hashed as a byte string.
    pub fn root_bytes(self) -> Option<usize> {
        match self {
            Self::Sha256Cbor | Self::Xxh3Cbor => None,
            _ => Some(8),
        }
    }
}

/// The keys of the whole blocks of `tokens` after `root` (numbers: big endian); a partial last block has none.
///
/// `extras`: `(block, what stands for its extras)`, in the order of blocks, none for a block without: CBOR, or for
/// [`Recipe::LlmdXxh64`] each value with its length before it.
pub fn keys(
    recipe: Recipe,
    root: &[u8],
    tokens: &[u32],
    block_size_tokens: usize,
    extras: &[(usize, Vec<u8>)],
) -> Vec<BlockKey> {
    let mut keys = Vec::with_capacity(tokens.len() / block_size_tokens);
    let mut content = Vec::with_capacity(64 + 5 * block_size_tokens);
    let mut parent = root.to_vec();
    let mut extras = extras.iter().peekable();
    for (number, block) in tokens.chunks_exact(block_size_tokens).enumerate() {
        let extra = extras.next_if(|(at, _)| *at == number).map(|(_, extra)| &extra[..]);
        keys.push(next(recipe, &mut parent, block, extra, &mut content));
    }
    keys
}

/// The key of a block; its digest takes the place of its parent's.
fn next(recipe: Recipe, parent: &mut Vec<u8>, tokens: &[u32], extra: Option<&[u8]>, content: &mut Vec<u8>) -> BlockKey {
    let key = match recipe {
        Recipe::LlmdCborFnv => llmd::cbor_fnv(last_64(parent), tokens, extra.unwrap_or(&cbor::NULL), content),
        Recipe::LlmdXxh64 => llmd::xxh64(last_64(parent), tokens, extra.unwrap_or_default(), content),
        Recipe::Sha256Cbor | Recipe::Xxh3Cbor | Recipe::Sha256Cbor64 => {
            content.clear();
            content.push(cbor::TRIPLE);
            match recipe {
                Recipe::Sha256Cbor64 => cbor::unsigned(content, last_64(parent)),
                _ => cbor::bytes(content, parent),
            }
            cbor::tokens(content, tokens);
            content.extend_from_slice(extra.unwrap_or(&cbor::NULL));
            parent.clear();
            match recipe {
                Recipe::Xxh3Cbor => parent.extend_from_slice(&xxh3_128(content).to_be_bytes()),
                _ => parent.extend_from_slice(&Sha256::digest(&content[..])),
            }
            return last_64(parent);
        }
    };
    parent.clear();
    parent.extend_from_slice(&key.to_be_bytes());
    key
}

/// The last 8 bytes as a number.
fn last_64(bytes: &[u8]) -> u64 {
    bytes.last_chunk().map_or(0, |last| u64::from_be_bytes(*last))
}
