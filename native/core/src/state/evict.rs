//! Giving up: what expired, what exceeds a bound, what nobody means any more.

use super::State;
use super::remove::forget_retired;
use super::{STEP_BLOCKS, SWEEP_MIN};
use crate::sets::Kind;
use crate::shared::Shared;
use crate::slots::{StreamId, is_held, slot_in, stream_of};
use crate::stream::Stream;
use crate::table::RecordId;
use smallvec::SmallVec;

impl State {
    /// Evict a key everywhere, and the engine blocks that make up nothing else. `reason`: a number in [`Stats::evicted`].
    pub fn evict(&mut self, primary: RecordId, reason: usize) {
        self.evicted[reason] += 1;
        let blocks = &mut self.shared.blocks;
        let set = blocks.set(primary);
        let key = blocks.key(primary);
        let mut holders: SmallVec<[StreamId; 8]> =
            blocks.sets.items(set).iter().filter(|item| is_held(**item)).map(|item| stream_of(slot_in(*item))).collect();
        holders.dedup();
        if blocks.sets.kind(set) == Kind::Block {
            for id in holders {
                let (shared, stream) = self.parts(id);
                let (held, retired) = shared.blocks.take_out(primary, id);
                note_gone(stream, held, retired);
                // an irregular block may make up the key too, and be held nowhere
                for (held, retired) in stream.irregular.evict(shared, &stream.name.clone(), key) {
                    note_gone(stream, held, retired);
                }
            }
            self.shared.blocks.free_if_empty(primary);
            return;
        }
        let names: Vec<RecordId> = blocks.names(primary).collect();
        for name in &names {
            let blocks = &self.shared.blocks;
            let mut knowers: SmallVec<[StreamId; 8]> =
                blocks.sets.items(blocks.set(*name)).iter().map(|item| stream_of(slot_in(*item))).collect();
            knowers.dedup();
            for id in knowers.into_iter().filter(|id| holders.binary_search(id).is_ok()) {
                let (shared, stream) = self.parts(id);
                let (held, retired) = shared.blocks.take_out(*name, id);
                note_gone(stream, held, retired);
            }
        }
        for id in holders {
            let (shared, stream) = self.parts(id);
            for (held, retired) in stream.irregular.evict(shared, &stream.name.clone(), key) {
                note_gone(stream, held, retired);
            }
        }
        for name in names {
            self.shared.blocks.free_if_empty(name);
        }
        // the key's own record is gone with its last name, or was freed by the last irregular block
        if self.shared.blocks.find_key(key) == Some(primary) {
            self.shared.blocks.free_if_empty(primary);
        }
    }

    fn most(&self, count: fn(&Stream) -> u64) -> Option<(u64, StreamId)> {
        self.streams().map(|stream| (count(stream), stream.id)).max_by_key(|(count, id)| (*count, !*id))
    }

    /// One step towards the byte bound. False if nothing is left to give up.
    pub fn give_up_something(&mut self) -> bool {
        if let Some((count, id)) = self.most(|stream| stream.retired[0] + stream.retired[1])
            && count > 0
        {
            let (shared, stream) = self.parts(id);
            let old = 1 - stream.young;
            let generation = if stream.retired[old as usize] > 0 { old } else { stream.young };
            forget_retired(shared, stream, generation);
            return true;
        }
        if let Some((count, id)) = self.most(|stream| stream.orphans.len() as u64)
            && count > 0
        {
            let (shared, stream) = self.parts(id);
            drop_oldest_orphan(shared, stream);
            return true;
        }
        if let Some(oldest) = self.oldest() {
            self.evict(oldest, 2);
            return true;
        }
        if let Some((count, id)) = self.most(|stream| stream.irregular.len() as u64)
            && count > 0
        {
            let (shared, stream) = self.parts(id);
            let hash = stream.irregular.oldest().expect("there is one");
            let (held, retired) = stream.irregular.drop_block(shared, &stream.name.clone(), hash);
            note_gone(stream, held, retired);
            return true;
        }
        self.shared.promises.give_up_next()
    }

    /// Whether something has expired: promises, or blocks.
    #[inline]
    pub fn is_due(&self, now_s: f64) -> bool {
        self.shared.promises.next_end_s() <= now_s || self.shared.recency.expired(now_s) >= self.not_before
    }

    /// Evict one key older than the time to live. False if there is none.
    pub fn expire_one(&mut self, now_s: f64) -> bool {
        let expired = self.shared.recency.expired(now_s);
        if expired < self.not_before {
            return false;
        }
        let Some(oldest) = self.oldest() else {
            self.not_before = self.shared.recency.now() + 1;
            return false;
        };
        self.not_before = self.shared.blocks.stamp_of(oldest);
        if self.not_before > expired {
            return false;
        }
        self.evict(oldest, 0);
        true
    }

    /// Whether [`State::oldest`] can tell without a look at all records.
    pub fn knows_oldest(&mut self) -> bool {
        self.shared.blocks.held == 0 || self.victims.known(&self.shared.blocks).is_some()
    }

    /// The least recently used key's record.
    pub fn oldest(&mut self) -> Option<RecordId> {
        self.victims.oldest(&self.shared.blocks)
    }

    /// Whether dead records are many enough to look for them, or a search is under way.
    #[inline]
    pub fn wants_sweep(&self) -> bool {
        let dead = self.shared.blocks.dead();
        self.sweep_at.is_some() || (dead > SWEEP_MIN && dead > self.shared.blocks.allocated() / 4)
    }

    /// Look at so many records, and free the dead ones.
    pub fn sweep(&mut self, records: u32) {
        let from = self.sweep_at.unwrap_or(1);
        let to = from.saturating_add(records).min(self.shared.blocks.numbers());
        for first in (from..to).step_by(STEP_BLOCKS) {
            let ids = first..to.min(first + STEP_BLOCKS as u32);
            self.shared.blocks.expect_dead(ids.clone());
            ids.for_each(|id| self.shared.blocks.sweep(id));
        }
        self.sweep_at = (to < self.shared.blocks.numbers()).then_some(to);
    }

    /// Whether a sweep is under way.
    pub fn is_sweeping(&self) -> bool {
        self.sweep_at.is_some()
    }
}

pub(super) fn drop_oldest_orphan(shared: &mut Shared, stream: &mut Stream) {
    let Some((hash, orphan)) = stream.orphans.pop_front() else { return };
    shared.orphans -= 1;
    if !orphan.copies.is_empty() {
        stream.held -= 1;
        stream.orphans_resident -= 1;
    }
    if let Some(parent) = orphan.parent {
        stream.stop_waiting(parent, hash);
    }
}

pub(super) fn note_gone(stream: &mut Stream, held: bool, retired: Option<u32>) {
    stream.held -= u64::from(held);
    stream.recall(retired);
}
