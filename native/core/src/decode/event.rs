//! One event: which fields its type has, in a map or in an array, and what they come to.

use super::fields::{Field, FieldSet, Fields};
use super::{Reader, Unusual, Wire, extras};
use crate::events::{Batch, Event, Removed, Stored};

/// The types of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tag {
    Stored,
    Removed,
    Cleared,
}

impl Tag {
    fn read(reader: &mut Reader) -> Result<Self, Unusual> {
        match reader.str_bytes()? {
            b"BlockStored" => Ok(Self::Stored),
            b"BlockRemoved" => Ok(Self::Removed),
            b"AllBlocksCleared" => Ok(Self::Cleared),
            _ => Err(Unusual),
        }
    }

    /// The fields of its array, in order. Trailing ones may be left out; those beyond are ignored.
    const fn in_array(self, wire: Wire) -> &'static [Field] {
        match (self, wire) {
            (Self::Stored, Wire::Vllm) => &STORED_VLLM,
            (Self::Stored, Wire::Sglang) => &STORED_SGLANG,
            (Self::Removed, Wire::Vllm) => &REMOVED_VLLM,
            (Self::Removed, Wire::Sglang) => &REMOVED_SGLANG,
            (Self::Cleared, Wire::Vllm) => &[Field::Medium],
            (Self::Cleared, Wire::Sglang) => &[Field::Ownership],
        }
    }

    /// The fields of its map. Other keys are ignored.
    const fn in_map(self) -> FieldSet {
        match self {
            Self::Stored => STORED_MAP,
            Self::Removed => REMOVED_MAP,
            Self::Cleared => CLEARED_MAP,
        }
    }

    const fn required(self) -> FieldSet {
        match self {
            Self::Stored => STORED_REQUIRED,
            Self::Removed => REMOVED_REQUIRED,
            Self::Cleared => FieldSet::of(&[]),
        }
    }
}

const STORED_VLLM: [Field; 14] = [
    Field::BlockHashes,
    Field::ParentBlockHash,
    Field::TokenIds,
    Field::BlockSize,
    Field::LoraId,
    Field::Medium,
    Field::LoraName,
    Field::ExtraKeys,
    Field::GroupIdx,
    Field::SpecKind,
    Field::SpecSlidingWindow,
    Field::Locality,
    Field::Ownership,
    Field::SessionId,
];

const STORED_SGLANG: [Field; 14] = {
    let mut fields = STORED_VLLM;
    fields[13] = Field::Metadata;
    fields
};

const STORED_MAP: FieldSet = FieldSet::of(&[
    Field::Type,
    Field::BlockHashes,
    Field::ParentBlockHash,
    Field::TokenIds,
    Field::BlockSize,
    Field::LoraId,
    Field::Medium,
    Field::LoraName,
    Field::ExtraKeys,
    Field::GroupIdx,
    Field::SpecKind,
    Field::SpecSlidingWindow,
    Field::Locality,
    Field::Ownership,
    Field::SessionId,
    Field::CacheSalt,
    Field::Metadata,
]);

const STORED_REQUIRED: FieldSet =
    FieldSet::of(&[Field::BlockHashes, Field::ParentBlockHash, Field::TokenIds, Field::BlockSize]);

const REMOVED_VLLM: [Field; 5] = [Field::BlockHashes, Field::Medium, Field::GroupIdx, Field::Locality, Field::Ownership];

const REMOVED_SGLANG: [Field; 7] = [
    Field::BlockHashes,
    Field::Medium,
    Field::GroupIdx,
    Field::SpecKind,
    Field::SpecSlidingWindow,
    Field::Locality,
    Field::Ownership,
];

const REMOVED_MAP: FieldSet =
    FieldSet::of(&[Field::Type, Field::BlockHashes, Field::Medium, Field::GroupIdx, Field::Locality, Field::Ownership]);

const REMOVED_REQUIRED: FieldSet = FieldSet::of(&[Field::BlockHashes]);

const CLEARED_MAP: FieldSet = FieldSet::of(&[Field::Type, Field::Medium]);

/// Read one event; its hashes and tokens go to the ends of `batch`'s.
pub(super) fn read(reader: &mut Reader, wire: Wire, batch: &mut Batch, extras_left: &mut usize) -> Result<Event, Unusual> {
    let mut fields = Fields::default();
    let in_map = reader.at_map();
    let tag = if in_map { read_map(&mut fields, reader, batch)? } else { read_array(&mut fields, reader, wire, batch)? };
    if !fields.seen.has_all(tag.required()) {
        return Err(Unusual);
    }
    Ok(match tag {
        Tag::Stored => Event::Stored(stored(&fields, in_map, extras_left)?),
        Tag::Removed => Event::Removed(Removed { hashes: fields.hashes.clone(), tier: fields.tier()?, group: fields.group }),
        Tag::Cleared if fields.medium.is_none_or(str::is_empty) => Event::Cleared(None),
        Tag::Cleared => Event::Cleared(Some(fields.tier()?)),
    })
}

fn read_array<'a>(fields: &mut Fields<'a>, reader: &mut Reader<'a>, wire: Wire, batch: &mut Batch) -> Result<Tag, Unusual> {
    let count = reader.array()?.checked_sub(1).ok_or(Unusual)?;
    let tag = Tag::read(reader)?;
    let order = tag.in_array(wire);
    for &field in order.iter().take(count) {
        fields.read(field, reader, batch)?;
    }
    for _ in order.len()..count {
        reader.skip()?;
    }
    Ok(tag)
}

fn read_map<'a>(fields: &mut Fields<'a>, reader: &mut Reader<'a>, batch: &mut Batch) -> Result<Tag, Unusual> {
    let count = reader.map()?;
    let tag = find_tag(*reader, count)?;
    let known = tag.in_map();
    for _ in 0..count {
        let key = reader.str_bytes()?;
        match Field::named(key) {
            Some(field) if known.has(field) => fields.read(field, reader, batch)?,
            _ => {
                super::reader::utf8(key)?;
                reader.skip()?;
            }
        }
    }
    Ok(tag)
}

/// Look ahead for the type. Engines send it first; a second one is found by who reads the fields.
fn find_tag(mut reader: Reader, count: usize) -> Result<Tag, Unusual> {
    for _ in 0..count {
        if reader.str_bytes()? == b"type" {
            return Tag::read(&mut reader);
        }
        reader.skip()?;
    }
    Err(Unusual)
}

fn stored(fields: &Fields, in_map: bool, extras_left: &mut usize) -> Result<Stored, Unusual> {
    if fields.block_size_tokens.is_none() && !fields.tokens.is_empty() {
        return Err(Unusual);
    }
    let lora_name = fields.adapter()?;
    let context = extras::Context {
        hashes: fields.hashes.len(),
        lora_name: lora_name.as_deref(),
        starts_chain: fields.parent.is_none(),
        salt: fields.salt(in_map),
    };
    Ok(Stored {
        hashes: fields.hashes.clone(),
        parent: fields.parent,
        tokens: fields.tokens.clone(),
        block_size_tokens: fields.block_size_tokens,
        tier: fields.tier()?,
        group: fields.group.unwrap_or(0),
        spec: fields.spec(),
        extras: extras::read(fields.extra_keys, &context, extras_left)?,
        lora_name,
    })
}
