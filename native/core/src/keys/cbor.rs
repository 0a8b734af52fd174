//! Canonical CBOR (RFC 8949, section 4.2) of the few things that are hashed.

/// Nothing.
pub const NULL: [u8; 1] = [0xF6];
/// An array of three: what engines and llm-d hash of a block.
pub const TRIPLE: u8 = 0x83;

const UNSIGNED: u8 = 0;
const BYTES: u8 = 2 << 5;
const TEXT: u8 = 3 << 5;
const ARRAY: u8 = 4 << 5;

/// A type and a number (the value itself, or a length) in as few bytes as hold it.
#[inline]
fn head(out: &mut Vec<u8>, major: u8, number: u64) {
    match number {
        0..=23 => out.push(major | number as u8),
        24..=0xFF => out.extend_from_slice(&[major | 24, number as u8]),
        0x100..=0xFFFF => {
            let [a, b] = (number as u16).to_be_bytes();
            out.extend_from_slice(&[major | 25, a, b]);
        }
        0x1_0000..=0xFFFF_FFFF => {
            let [a, b, c, d] = (number as u32).to_be_bytes();
            out.extend_from_slice(&[major | 26, a, b, c, d]);
        }
        _ => {
            out.push(major | 27);
            out.extend_from_slice(&number.to_be_bytes());
        }
    }
}

pub fn unsigned(out: &mut Vec<u8>, number: u64) {
    head(out, UNSIGNED, number);
}

pub fn bytes(out: &mut Vec<u8>, value: &[u8]) {
    head(out, BYTES, value.len() as u64);
    out.extend_from_slice(value);
}

/// Text, which the caller says is UTF-8.
pub fn text(out: &mut Vec<u8>, value: &[u8]) {
    head(out, TEXT, value.len() as u64);
    out.extend_from_slice(value);
}

/// The beginning of an array: its items follow.
pub fn array(out: &mut Vec<u8>, items: usize) {
    head(out, ARRAY, items as u64);
}

/// A map with one entry: the value follows.
pub fn map_of_one(out: &mut Vec<u8>, key: &[u8]) {
    out.push(0xA1);
    text(out, key);
}

pub fn tokens(out: &mut Vec<u8>, tokens: &[u32]) {
    array(out, tokens.len());
    tokens.iter().for_each(|token| unsigned(out, u64::from(*token)));
}
