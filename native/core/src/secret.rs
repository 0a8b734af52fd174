//! Keyed mixing: tables spread names by a secret, so that a peer that chooses names can't choose where they fall.

#[cfg(not(fuzzing))]
use std::hash::{BuildHasher, RandomState};

/// What a process mixes its names with.
pub type Secret = [u64; 2];

/// A new secret, from the operating system's randomness.
pub fn random() -> Secret {
    #[cfg(fuzzing)]
    return fixed();
    #[cfg(not(fuzzing))]
    draw()
}

#[cfg(not(fuzzing))]
fn draw() -> Secret {
    let state = RandomState::new();
    [state.hash_one(1), state.hash_one(2) | 1]
}

/// Always the same one, for tests and fuzzers.
#[cfg(any(test, fuzzing))]
pub fn fixed() -> Secret {
    [0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3211]
}

/// Spread 64 bits over 64 bits: both halves of a 128-bit product.
#[inline]
pub fn mix(value: u64, secret: Secret) -> u64 {
    let product = u128::from(value ^ secret[0]) * u128::from(secret[1]);
    (product as u64 ^ (product >> 64) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}
