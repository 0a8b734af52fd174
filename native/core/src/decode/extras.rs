//! A stored event's extra keys. As `kvatlas.ingest.decode.extras`, which says why each is read as it is.

use super::{EXTRA_BYTES_MAX, Reader, Unusual};
use crate::events::Extra;

const OFFSET_LIMIT: i64 = 1 << 31;

/// What extra keys are read with: the event around them.
pub(super) struct Context<'a> {
    pub(super) hashes: usize,
    pub(super) lora_name: Option<&'a str>,
    /// The event's first hash has no parent.
    pub(super) starts_chain: bool,
    /// Where the event says it apart; not empty.
    pub(super) salt: Option<&'a str>,
}

/// Return one list a hash up to the last hash that has any, or nothing where the event has no extra keys. `left`: how many more extras the payload may hold.
pub(super) fn read(
    extra_keys: Option<Reader>,
    context: &Context,
    left: &mut usize,
) -> Result<Option<Vec<Vec<Extra>>>, Unusual> {
    let salt = context.salt.filter(|_| context.starts_chain && context.hashes > 0);
    let mut blocks = match extra_keys {
        Some(mut reader) => {
            if reader.array()? != context.hashes {
                return Err(Unusual);
            }
            let mut blocks = Vec::new();
            for i in 0..context.hashes {
                let place = Place { first: context.starts_chain && i == 0, salt_apart: salt.is_some() };
                let extras = read_block(&mut reader, context.lora_name, place, left)?;
                if !extras.is_empty() {
                    blocks.resize(i, Vec::new());
                    blocks.push(extras);
                }
            }
            blocks
        }
        None if salt.is_some() => Vec::new(),
        None => return Ok(None),
    };
    if let Some(salt) = salt {
        blocks.resize(blocks.len().max(1), Vec::new());
        blocks[0].push(extra("salt", salt.as_bytes()));
    }
    Ok(Some(blocks))
}

/// What a string without a tag means follows from where it is.
#[derive(Clone, Copy)]
struct Place {
    /// In the first block of a chain.
    first: bool,
    /// The event says its salt elsewhere.
    salt_apart: bool,
}

fn read_block(reader: &mut Reader, lora_name: Option<&str>, place: Place, left: &mut usize) -> Result<Vec<Extra>, Unusual> {
    if reader.nil() {
        return Ok(Vec::new());
    }
    let count = reader.array()?;
    *left = left.checked_sub(count).ok_or(Unusual)?;
    let mut extras = Vec::with_capacity(count);
    for i in 0..count {
        let before = reader.rest().len();
        if reader.at_str() {
            let text = reader.str()?;
            if i == 0 && Some(text) == lora_name {
                // the adapter's name is in the root of the chain already
            } else if !place.first {
                extras.push(extra("opaque", &packed(text)));
            } else if !place.salt_apart {
                extras.push(extra("salt", text.as_bytes()));
            }
        } else if reader.at_bin() {
            extras.push(extra("opaque", reader.bin()?));
        } else {
            extras.push(item(reader)?);
        }
        if before - reader.rest().len() > EXTRA_BYTES_MAX {
            return Err(Unusual);
        }
    }
    Ok(extras)
}

/// A multimodal item: its content's hash and where it starts.
fn item(reader: &mut Reader) -> Result<Extra, Unusual> {
    if reader.array()? != 2 {
        return Err(Unusual);
    }
    let identifier = reader.str()?;
    let offset_tokens = i64::try_from(reader.int()?).map_err(|_| Unusual)?;
    if !(-OFFSET_LIMIT..OFFSET_LIMIT).contains(&offset_tokens) {
        return Err(Unusual);
    }
    Ok(Extra { offset_tokens, ..extra("mm", identifier.as_bytes()) })
}

fn extra(kind: &str, value: &[u8]) -> Extra {
    Extra { offset_tokens: 0, kind: kind.into(), value: value.into() }
}

/// A string as msgpack, in its shortest form.
fn packed(text: &str) -> Vec<u8> {
    let mut packed = Vec::with_capacity(5 + text.len());
    match text.len() {
        length @ ..=0x1F => packed.push(0xA0 | length as u8),
        length @ ..=0xFF => packed.extend([0xD9, length as u8]),
        length @ ..=0xFFFF => {
            packed.push(0xDA);
            packed.extend((length as u16).to_be_bytes());
        }
        length => {
            packed.push(0xDB);
            packed.extend((length as u32).to_be_bytes());
        }
    }
    packed.extend(text.as_bytes());
    packed
}
