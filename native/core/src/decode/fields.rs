//! The fields of an event, in whatever order they come. As `kvatlas.ingest.decode.wire` and `.fields`.

use super::{BLOCK_SIZE_TOKENS_MAX, HASHES_PER_EVENT_MAX, Reader, TEXT_CHARS_MAX, TOKENS_PER_EVENT_MAX, Unusual};
use crate::events::{AttentionKind, Batch, GroupSpec, Tier};
use std::ops::Range;

const GROUP_MAX: u32 = 0xFFFF;

/// A field of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Field {
    Type,
    BlockHashes,
    ParentBlockHash,
    TokenIds,
    BlockSize,
    LoraId,
    Medium,
    LoraName,
    ExtraKeys,
    GroupIdx,
    SpecKind,
    SpecSlidingWindow,
    Locality,
    Ownership,
    SessionId,
    CacheSalt,
    Metadata,
}

impl Field {
    /// The field that a map's key names.
    #[inline]
    pub(super) fn named(key: &[u8]) -> Option<Self> {
        Some(match key {
            b"type" => Self::Type,
            b"block_hashes" => Self::BlockHashes,
            b"parent_block_hash" => Self::ParentBlockHash,
            b"token_ids" => Self::TokenIds,
            b"block_size" => Self::BlockSize,
            b"lora_id" => Self::LoraId,
            b"medium" => Self::Medium,
            b"lora_name" => Self::LoraName,
            b"extra_keys" => Self::ExtraKeys,
            b"group_idx" => Self::GroupIdx,
            b"kv_cache_spec_kind" => Self::SpecKind,
            b"kv_cache_spec_sliding_window" => Self::SpecSlidingWindow,
            b"locality" => Self::Locality,
            b"ownership" => Self::Ownership,
            b"session_id" => Self::SessionId,
            b"cache_salt" => Self::CacheSalt,
            b"metadata" => Self::Metadata,
            _ => return None,
        })
    }
}

/// A set of fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FieldSet(u32);

impl FieldSet {
    pub(super) const fn of(fields: &[Field]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < fields.len() {
            bits |= 1 << fields[i] as u32;
            i += 1;
        }
        Self(bits)
    }

    pub(super) const fn has(self, field: Field) -> bool {
        self.0 & 1 << field as u32 != 0
    }

    pub(super) const fn has_all(self, fields: Self) -> bool {
        self.0 & fields.0 == fields.0
    }

    fn add(&mut self, field: Field) {
        self.0 |= 1 << field as u32;
    }
}

/// `lora_id`: a number, or a name in some versions.
#[derive(Clone, Copy, Debug)]
enum LoraId<'a> {
    Number(i128),
    Name(&'a str),
}

/// What an event's fields said so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Fields<'a> {
    pub(super) seen: FieldSet,
    /// In [`Batch::hashes`].
    pub(super) hashes: Range<usize>,
    pub(super) parent: Option<u64>,
    /// In [`Batch::tokens`].
    pub(super) tokens: Range<usize>,
    /// None for 0 as well.
    pub(super) block_size_tokens: Option<u32>,
    pub(super) medium: Option<&'a str>,
    pub(super) group: Option<u32>,
    /// Still to be read, where it is not nil: what it means depends on other fields.
    pub(super) extra_keys: Option<Reader<'a>>,
    lora_id: Option<LoraId<'a>>,
    lora_name: Option<&'a str>,
    spec_kind: Option<&'a str>,
    spec_window_tokens: Option<i128>,
    cache_salt: Option<&'a str>,
    /// The salt in `metadata`, where that is not nil.
    metadata: Option<Option<&'a str>>,
    /// The salt in the metadata that SGLang's shorter array has in the place of the adapter's name.
    metadata_as_name: Option<&'a str>,
}

impl<'a> Fields<'a> {
    /// Read one field's value. A field that was there already is unusual.
    pub(super) fn read(&mut self, field: Field, reader: &mut Reader<'a>, batch: &mut Batch) -> Result<(), Unusual> {
        if self.seen.has(field) {
            return Err(Unusual);
        }
        self.seen.add(field);
        match field {
            Field::Type => drop(reader.str_bytes()?),
            Field::BlockHashes => self.hashes = hashes(reader, &mut batch.hashes)?,
            Field::ParentBlockHash => self.parent = if reader.nil() { None } else { Some(reader.hash()?) },
            Field::TokenIds => self.tokens = tokens(reader, &mut batch.tokens)?,
            Field::BlockSize => {
                let size = reader.int_or_nil()?.map(|size| at_most(size, BLOCK_SIZE_TOKENS_MAX)).transpose()?;
                self.block_size_tokens = size.filter(|&size| size > 0);
            }
            Field::LoraId if reader.at_str() => self.lora_id = Some(LoraId::Name(reader.str()?)),
            Field::LoraId => self.lora_id = reader.int_or_nil()?.map(LoraId::Number),
            Field::Medium => self.medium = text(reader)?,
            Field::LoraName if reader.at_map() => self.metadata_as_name = metadata(reader)?,
            Field::LoraName => self.lora_name = text(reader)?,
            Field::ExtraKeys if reader.nil() => {}
            Field::ExtraKeys => {
                self.extra_keys = Some(*reader);
                reader.skip()?;
            }
            Field::GroupIdx => self.group = reader.int_or_nil()?.map(|group| at_most(group, GROUP_MAX)).transpose()?,
            Field::SpecKind => self.spec_kind = reader.str_or_nil()?,
            Field::SpecSlidingWindow => self.spec_window_tokens = reader.int_or_nil()?,
            Field::Locality | Field::Ownership | Field::SessionId => drop(text(reader)?),
            Field::CacheSalt => self.cache_salt = reader.str_or_nil()?,
            Field::Metadata => self.metadata = if reader.nil() { None } else { Some(metadata(reader)?) },
        }
        Ok(())
    }

    /// Where a copy lies. No medium means the device.
    pub(super) fn tier(&self) -> Result<Tier, Unusual> {
        let Some(medium) = self.medium.filter(|medium| !medium.is_empty()) else {
            return Ok(Tier::gpu());
        };
        if medium.eq_ignore_ascii_case("gpu") {
            return Ok(Tier::gpu());
        }
        if !medium.is_ascii() {
            return Err(Unusual); // only of ASCII is it certain that Python's lower case is the same
        }
        let name = medium.to_ascii_lowercase();
        Ok(match name.as_str() {
            "cpu_pinned" | "host" => Tier::named("cpu"),
            "external" => Tier::named("storage"),
            name => Tier::named(name),
        })
    }

    /// How the group caches; none if the event tells nothing of it.
    pub(super) fn spec(&self) -> Option<GroupSpec> {
        let block_size_tokens = self.block_size_tokens;
        if self.spec_kind.is_none() && block_size_tokens.is_none() {
            return None;
        }
        let window_tokens = self.spec_window_tokens.and_then(|window| u64::try_from(window).ok()).filter(|&window| window > 0);
        let (kind, window_tokens) = match (self.spec_kind.unwrap_or(""), window_tokens) {
            ("sliding_window" | "sliding_window_mla", Some(_)) => (AttentionKind::SlidingWindow, window_tokens),
            ("mamba", _) => (AttentionKind::State, None),
            ("encoder_only_attention" | "cross_attention", _) => (AttentionKind::Ignored, None),
            _ => (AttentionKind::Full, None),
        };
        Some(GroupSpec { kind, window_tokens, block_size_tokens })
    }

    /// The adapter's name; `lora:<id>` where only its number is known; none for the base model.
    pub(super) fn adapter(&self) -> Result<Option<Box<str>>, Unusual> {
        if let Some(name) = self.lora_name.filter(|name| !name.is_empty()) {
            return Ok(Some(name.into()));
        }
        Ok(match self.lora_id {
            None | Some(LoraId::Number(0) | LoraId::Name("")) => None,
            Some(LoraId::Number(id)) => Some(format!("lora:{id}").into()),
            Some(LoraId::Name(id)) => Some(format!("lora:{}", checked(id)?).into()),
        })
    }

    /// The cache salt, where the event names it outside of its extra keys.
    pub(super) fn salt(&self, in_map: bool) -> Option<&'a str> {
        let salt = if in_map {
            self.cache_salt.filter(|salt| !salt.is_empty()).or(self.metadata.flatten())
        } else {
            self.metadata.unwrap_or(self.metadata_as_name)
        };
        salt.filter(|salt| !salt.is_empty())
    }
}

#[inline]
fn hashes(reader: &mut Reader, hashes: &mut Vec<u64>) -> Result<Range<usize>, Unusual> {
    let start = hashes.len();
    let count = reader.array()?;
    if count > HASHES_PER_EVENT_MAX {
        return Err(Unusual);
    }
    hashes.reserve(count);
    for _ in 0..count {
        hashes.push(reader.hash()?);
    }
    Ok(start..start + count)
}

#[inline]
fn tokens(reader: &mut Reader, tokens: &mut Vec<u32>) -> Result<Range<usize>, Unusual> {
    let start = tokens.len();
    let count = reader.array()?;
    if count > TOKENS_PER_EVENT_MAX {
        return Err(Unusual);
    }
    tokens.resize(start + count, 0);
    reader.tokens(&mut tokens[start..])?;
    Ok(start..start + count)
}

/// The salt in a map of SGLang's.
fn metadata<'a>(reader: &mut Reader<'a>) -> Result<Option<&'a str>, Unusual> {
    let mut salt = None;
    for _ in 0..reader.map()? {
        if reader.str()? != "cache_salt" {
            reader.skip()?;
        } else if salt.replace(reader.str_or_nil()?).is_some() {
            return Err(Unusual);
        }
    }
    Ok(salt.flatten())
}

fn text<'a>(reader: &mut Reader<'a>) -> Result<Option<&'a str>, Unusual> {
    reader.str_or_nil()?.map(checked).transpose()
}

fn checked(text: &str) -> Result<&str, Unusual> {
    let short = text.len() <= TEXT_CHARS_MAX || text.chars().count() <= TEXT_CHARS_MAX;
    if short { Ok(text) } else { Err(Unusual) }
}

pub(super) fn at_most(value: i128, max: u32) -> Result<u32, Unusual> {
    u32::try_from(value).ok().filter(|&value| value <= max).ok_or(Unusual)
}
