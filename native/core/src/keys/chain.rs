//! Chains of whole blocks whose extras are serialized already: ours, and what engines and llm-d hash.

use super::{BlockKey, cbor, llmd, push_tokens};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// How a block's hash is made of its parent's, its tokens and its extras.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// As [`super::Mode::Kvatlas`].
    Kvatlas,
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
            "kvatlas" => Self::Kvatlas,
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
/// [`Recipe::LlmdXxh64`] each value with its length before it, for [`Recipe::Kvatlas`] as `kvatlas.keys.chain` has them.
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
        Recipe::Kvatlas => {
            content.clear();
            content.extend_from_slice(&last_64(parent).to_le_bytes());
            push_tokens(content, tokens);
            content.extend_from_slice(extra.unwrap_or_default());
            xxh3_64(content)
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vllm_0_32_hashes_so() {
        let none_hash = hex("9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0");
        let mut tokens: Vec<u32> = (1000..1016).collect();
        tokens.extend([0, 23, 24, 255, 256, 65535, 65536, 151643, 2147483647, 5, 6, 7, 8, 9, 10, 11, 99]);
        let found = keys(Recipe::Sha256Cbor, &none_hash, &tokens, 16, &[]);
        assert_eq!(found, [3753563854825738204, 9104798072040182043]);
        let salt = (0, hex("81826a63616368655f73616c74627331"));
        let found = keys(Recipe::Sha256Cbor, &none_hash, &tokens, 16, &[salt]);
        assert_eq!(found, [9638956459197874485, 16383054852124426873]);
    }

    #[test]
    fn llm_d_hashes_so() {
        let tokens: Vec<u32> = (1..=32).collect();
        for (recipe, root, expected) in [
            (Recipe::LlmdCborFnv, llmd::cbor_fnv_root(b"42", b"test-model"), [3239622172847516705, 18365376266021390534]),
            (Recipe::LlmdXxh64, llmd::xxh64_root(b"", b"test-model"), [13553460584553255540, 9887990258693334188]),
        ] {
            assert_eq!(keys(recipe, &root.to_be_bytes(), &tokens, 16, &[]), expected);
        }
    }

    #[test]
    fn extras_beyond_the_last_whole_block_change_nothing() {
        let tokens = [1, 2, 3];
        let plain = keys(Recipe::Xxh3Cbor, b"root", &tokens, 2, &[]);
        assert_eq!(keys(Recipe::Xxh3Cbor, b"root", &tokens, 2, &[(1, vec![0xF5])]), plain);
        assert_ne!(keys(Recipe::Xxh3Cbor, b"root", &tokens, 2, &[(0, vec![0xF5])]), plain);
    }

    fn hex(text: &str) -> Vec<u8> {
        text.as_bytes().chunks(2).map(|two| u8::from_str_radix(str::from_utf8(two).unwrap_or(""), 16).unwrap_or(0)).collect()
    }
}
