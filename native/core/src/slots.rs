//! Numbers for the coordinates of a copy: which stream, and which place (tier and attention group) of it.
//!
//! ```text
//! slot = stream, 20 bits | place, 12 bits      item = slot, 32 bits | copies, 32 bits
//! ```
//!
//! Items sort by stream, so what a stream has in a holder set lies together. A stream's first two places hold no copies: they
//! say that the block is *retired* there, held nowhere but remembered, in one of two generations.

/// A stream's number.
pub type StreamId = u32;

/// A place of a stream.
pub type Slot = u32;

/// A slot and how many copies it has.
pub type Item = u64;

/// Streams there can be.
pub const STREAMS_MAX: usize = crate::size(1 << 20, 6);

/// Places that a stream's copies can lie in; as `kvatlas.index.protocol.PLACES_MAX`.
pub const PLACES_MAX: usize = crate::size(1000, 5);

/// The place numbers that mean "retired".
pub const RETIRED: u32 = 2;

/// A slot.
#[inline]
pub fn slot(stream: StreamId, place: u32) -> Slot {
    stream << 12 | place
}

/// The slot that says that a stream remembers a block in a generation (0 or 1).
#[inline]
pub fn retired(stream: StreamId, generation: u32) -> Slot {
    slot(stream, generation)
}

/// Whose slot it is.
#[inline]
pub fn stream_of(slot: Slot) -> StreamId {
    slot >> 12
}

/// Which of the stream's places it is.
#[inline]
pub fn place_of(slot: Slot) -> u32 {
    slot & 0xFFF
}

/// An item.
#[inline]
pub fn item(slot: Slot, copies: u32) -> Item {
    u64::from(slot) << 32 | u64::from(copies)
}

/// An item's slot.
#[inline]
pub fn slot_in(item: Item) -> Slot {
    (item >> 32) as Slot
}

/// An item's copies.
#[inline]
pub fn copies_in(item: Item) -> u32 {
    item as u32
}

/// Whether an item stands for copies, and not for a memory of them.
#[inline]
pub fn is_held(item: Item) -> bool {
    place_of(slot_in(item)) >= RETIRED
}
