//! What all streams share: the blocks, the promises, the clock of uses.

use crate::blocks::Blocks;
use crate::keys::{BlockKey, KeySchema};
use crate::promises::{Promises, StreamName};
use crate::recency::Recency;
use crate::report::Limits;
use crate::sets::Op;
use crate::slots::Slot;
use crate::table::RecordId;

/// Everything but the streams.
pub struct Shared {
    /// How keys are made.
    pub schema: KeySchema,
    /// Bounds.
    pub limits: Limits,
    /// The records.
    pub blocks: Blocks,
    /// Speculative entries.
    pub promises: Promises,
    /// The order of use.
    pub recency: Recency,
    /// The time of the operation that is under way.
    pub now_s: f64,
    /// Irregular blocks of all streams.
    pub irregular: usize,
    /// Orphans of all streams.
    pub orphans: usize,
    /// For keys under construction.
    pub content: Vec<u8>,
}

impl Shared {
    /// Change how many copies of a key a slot has, for blocks that are named elsewhere.
    pub fn hold(&mut self, stream: &StreamName, slot: Slot, key: BlockKey, change: i64) {
        if change == 0 {
            return;
        }
        let Some(record) = self.blocks.key_record(key) else { return };
        if change > 0 {
            self.blocks.change_primary(record, Op::Add(slot, change as u32));
            self.held_more(stream, record, key);
        } else {
            self.blocks.change_primary(record, Op::Remove(slot, (-change) as u32, 0));
            self.blocks.free_if_empty(record);
        }
    }

    /// Somebody has more copies of a block than before: it counts as used, and a promise of it is kept.
    pub fn held_more(&mut self, stream: &StreamName, primary: RecordId, key: BlockKey) {
        let before = self.recency.take(1, self.now_s);
        self.blocks.stamp(primary, before + 1);
        self.promises.keep(key, stream);
    }
}
