//! What a payload says, in a form that costs no allocation for each block.
//!
//! Hashes and tokens of all events of a payload lie one after the other in two vectors; events name ranges of them.

use std::borrow::Cow;
use std::ops::Range;

/// The engine's name for a block, as 64 bits: opaque, and all that a removal carries.
pub type EngineHash = u64;

/// Where a copy lies: the engine's medium in lower case, so unknown media stay what they are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tier(pub Cow<'static, str>);

impl Tier {
    /// The device: where no medium is named.
    pub fn gpu() -> Self {
        Self(Cow::Borrowed("gpu"))
    }

    /// A tier by its name, which is in lower case already.
    pub fn named(name: &str) -> Self {
        let known = ["gpu", "cpu", "disk", "storage"].into_iter().find(|known| *known == name);
        Self(known.map_or_else(|| Cow::Owned(name.to_owned()), Cow::Borrowed))
    }
}

/// What a hit needs from an attention group. As `kvatlas.types.AttentionKind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKind {
    /// Every block from 0 on.
    Full,
    /// The last `window_tokens - 1` tokens.
    SlidingWindow,
    /// The one block that ends at the hit.
    State,
    /// Nothing.
    Ignored,
}

/// How one attention group of a model caches, as its engine announced it. As `kvatlas.types.GroupSpec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSpec {
    /// What a hit needs.
    pub kind: AttentionKind,
    /// For a sliding window: its width.
    pub window_tokens: Option<u64>,
    /// Tokens of one of the engine's blocks in this group.
    pub block_size_tokens: Option<u32>,
}

/// What a block's key depends on beyond its tokens. As `kvatlas.types.Extra`, ordered as it is there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Extra {
    /// Where it starts, from the block's first token on.
    pub offset_tokens: i64,
    /// `mm`, `salt` or `opaque`.
    pub kind: Box<str>,
    /// What it is.
    pub value: Box<[u8]>,
}

/// Copies of blocks were added.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// In [`Batch::hashes`].
    pub hashes: Range<usize>,
    /// The block before the first one; none where the event starts a chain.
    pub parent: Option<EngineHash>,
    /// In [`Batch::tokens`].
    pub tokens: Range<usize>,
    /// None in an offload placeholder, which names blocks already known by hash.
    pub block_size_tokens: Option<u32>,
    /// Where the copies lie.
    pub tier: Tier,
    /// The attention group.
    pub group: u32,
    /// How that group caches, if the event says so.
    pub spec: Option<GroupSpec>,
    /// The adapter that stands in for the model at the root of the chain.
    pub lora_name: Option<Box<str>>,
    /// One list a hash up to the last hash that has any, or nothing at all.
    pub extras: Option<Vec<Vec<Extra>>>,
}

/// One copy of each block was removed.
#[derive(Clone, Debug, PartialEq)]
pub struct Removed {
    /// In [`Batch::hashes`].
    pub hashes: Range<usize>,
    /// Where it lay.
    pub tier: Tier,
    /// None means every group.
    pub group: Option<u32>,
}

/// One thing that happened to an engine's cache.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Copies were added.
    Stored(Stored),
    /// Copies were removed.
    Removed(Removed),
    /// A tier was emptied; none means the device.
    Cleared(Option<Tier>),
}

/// What one payload says, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// The engine's clock, unix seconds.
    pub timestamp_s: Option<f64>,
    /// The data-parallel rank that the payload names.
    pub dp_rank: Option<u32>,
    /// In order.
    pub events: Vec<Event>,
    /// Of all events.
    pub hashes: Vec<EngineHash>,
    /// Of all events.
    pub tokens: Vec<u32>,
}

impl Batch {
    /// Empty it, keeping its memory for the next payload.
    pub fn clear(&mut self) {
        self.timestamp_s = None;
        self.dp_rank = None;
        self.events.clear();
        self.hashes.clear();
        self.tokens.clear();
    }
}
