//! Who goes next: the least recently used keys, some at a time.

use crate::blocks::Blocks;
use crate::recency::Tick;
use crate::table::RecordId;

/// Looked at to estimate how old "old" is.
const SAMPLES: u32 = crate::size(1024, 4) as u32;
/// Below this many records, all are sorted.
const FEW: u32 = crate::size(4096, 8) as u32;
/// Otherwise about this share of them: a scan of all records serves so many evictions.
const SHARE: usize = 16;

/// The oldest keys as of the last scan. A key that was used since has another stamp, and is passed over: all stamps given after
/// the scan are larger than those in here, so the order is exact.
#[derive(Default)]
pub struct Victims {
    /// Oldest last.
    found: Vec<(Tick, RecordId)>,
}

impl Victims {
    /// Look through all records. This takes a while: nobody needs to wait for it but who evicts.
    pub fn of(blocks: &Blocks) -> Self {
        let mut victims = Self::default();
        victims.scan(blocks);
        victims
    }

    /// The least recently used key's record, if it is known without another look at all records.
    pub fn known(&mut self, blocks: &Blocks) -> Option<RecordId> {
        while let Some((stamp, id)) = self.found.last().copied() {
            if blocks.is_held_primary(id) && blocks.stamp_of(id) == stamp {
                return Some(id);
            }
            self.found.pop();
        }
        None
    }

    /// The least recently used key's record, if any key is held.
    pub fn oldest(&mut self, blocks: &Blocks) -> Option<RecordId> {
        if blocks.held == 0 {
            return None;
        }
        if let Some(known) = self.known(blocks) {
            return Some(known);
        }
        self.scan(blocks);
        self.known(blocks)
    }

    /// The next one as far as it is known without a scan.
    #[cfg(any(test, fuzzing))]
    pub fn peek(&self, blocks: &Blocks) -> Option<RecordId> {
        let is_current = |(stamp, id): &&(Tick, RecordId)| blocks.is_held_primary(*id) && blocks.stamp_of(*id) == *stamp;
        self.found.iter().rev().find(is_current).map(|(_, id)| *id)
    }

    fn scan(&mut self, blocks: &Blocks) {
        let limit = if blocks.numbers() <= FEW { Tick::MAX } else { old(blocks) };
        self.collect(blocks, limit);
        if self.found.is_empty() {
            self.collect(blocks, Tick::MAX);
        }
    }

    fn collect(&mut self, blocks: &Blocks, limit: Tick) {
        let held = (1..blocks.numbers()).filter(|id| blocks.is_held_primary(*id));
        self.found.extend(held.map(|id| (blocks.stamp_of(id), id)).filter(|(stamp, _)| *stamp <= limit));
        self.found.sort_unstable_by(|one, other| other.cmp(one));
    }
}

/// A stamp that about one in [`SHARE`] keys is older than.
fn old(blocks: &Blocks) -> Tick {
    let step = (blocks.numbers() / SAMPLES).max(1) as usize;
    let sampled = (1..blocks.numbers()).step_by(step).filter(|id| blocks.is_held_primary(*id));
    let mut stamps: Vec<Tick> = sampled.map(|id| blocks.stamp_of(id)).collect();
    stamps.sort_unstable();
    stamps.get(stamps.len() / SHARE).copied().unwrap_or(Tick::MAX)
}
