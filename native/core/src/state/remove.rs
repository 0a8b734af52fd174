//! Blocks removed, tiers cleared, streams dropped.

use super::State;
use crate::blocks::Blocks;
use crate::events::{EngineHash, Tier};
use crate::report::Report;
use crate::secret;
use crate::sets::{Kind, Op, SetId};
use crate::shared::Shared;
use crate::slots::{Item, Slot, StreamId, is_held, item, retired, slot_in, stream_of};
use crate::stream::Stream;
use crate::table::RecordId;
use crate::victims::Victims;
use smallvec::SmallVec;

impl State {
    /// Remove one copy of each block in a tier: in one group, or in each. An engine gives up a chain from its end.
    pub fn remove_blocks(&mut self, id: StreamId, slots: &[Slot], hashes: &[EngineHash], report: &mut Report) {
        let (shared, stream) = self.parts(id);
        let blocks = &shared.blocks;
        if !blocks.is_hash_of(stream.removed_last.wrapping_sub(1), hashes[0], id) {
            hashes.iter().for_each(|hash| blocks.expect_hash(blocks.place(*hash)));
        }
        for hash in hashes {
            let before = stream.removed_last.wrapping_sub(1);
            let record =
                if shared.blocks.is_hash_of(before, *hash, id) { Some(before) } else { shared.blocks.find_hash(*hash, id) };
            let found = match record {
                Some(record) => remove_copy(shared, stream, slots, record),
                None => slots.iter().filter(|slot| remove_elsewhere(shared, stream, **slot, *hash, 1) > 0).count() > 0,
            };
            report.removed += u64::from(found);
            report.removed_unknown += u64::from(!found);
        }
    }

    /// A stream's slots in a tier that a removal means.
    pub fn slots_in(&self, id: StreamId, tier: &Tier, group: Option<u32>) -> SmallVec<[Slot; 4]> {
        self.tiers.find(tier).map(|tier| self.stream(id).slots_in(tier, group)).unwrap_or_default()
    }

    /// Clear what is no record of its own. The sets follow, with [`State::clear_set`].
    pub fn begin_clear(&mut self, id: StreamId, slots: &[Slot], report: &mut Report) {
        let (shared, stream) = self.parts(id);
        for slot in slots {
            let elsewhere = stream.irregular.hashes().into_iter().chain(stream.orphans.keys().copied());
            for hash in elsewhere.collect::<Vec<_>>() {
                report.cleared += u64::from(remove_elsewhere(shared, stream, *slot, hash, u32::MAX) > 0);
            }
        }
    }

    /// Take slots of a stream out of one set: out of all blocks that have it.
    pub fn clear_set(&mut self, id: StreamId, slots: &[Slot], set: SetId, report: &mut Report) {
        let (shared, stream) = self.parts(id);
        let sets = &mut shared.blocks.sets;
        if sets.resolve(set) != set {
            sets.shorten(set);
            return;
        }
        let mine = sets.of_stream(set, id);
        if !mine.iter().any(|item| slots.contains(&slot_in(*item))) {
            return;
        }
        let kind = sets.kind(set);
        let others_held = mine.iter().any(|item| is_held(*item) && !slots.contains(&slot_in(*item)));
        let mut items: Vec<Item> = sets.items(set).iter().copied().filter(|item| !slots.contains(&slot_in(*item))).collect();
        let retires = !others_held && kind != Kind::Key;
        if retires {
            let slot = retired(id, stream.young);
            items.insert(items.partition_point(|item| slot_in(*item) < slot), item(slot, 1));
        }
        let (records, copies) = shared.blocks.replace_set(set, &items);
        if kind != Kind::Key {
            report.cleared += (records * copies) as u64;
        }
        if retires {
            stream.held -= records as u64;
            stream.retired[stream.young as usize] += records as u64;
        }
    }

    /// The last step of every event: a full generation of retired blocks becomes the old one, and the old one is forgotten.
    #[inline]
    pub fn end_event(&mut self, id: StreamId) {
        let (shared, stream) = self.parts(id);
        let retired_max = shared.limits.retired_max as u64;
        if stream.retired[stream.young as usize] < (retired_max / 2).max(1) {
            return;
        }
        let young = stream.young;
        forget_retired(shared, stream, 1 - young);
        stream.young = 1 - young;
        if stream.retired[young as usize] > retired_max {
            forget_retired(shared, stream, young);
        }
    }

    /// Take a stream out of one set.
    pub fn drop_from_set(&mut self, id: StreamId, set: SetId) {
        let blocks = &mut self.shared.blocks;
        if blocks.sets.resolve(set) != set {
            blocks.sets.shorten(set);
        } else if !blocks.sets.of_stream(set, id).is_empty() {
            let items: Vec<Item> =
                blocks.sets.items(set).iter().copied().filter(|item| stream_of(slot_in(*item)) != id).collect();
            blocks.replace_set(set, &items);
        }
    }

    /// After it was taken out of all sets: begin a stream anew. Its name, model and mark stay.
    pub fn renew_stream(&mut self, id: StreamId) {
        let (shared, stream) = self.parts(id);
        let mut fresh = Stream::new(id, stream.name.clone());
        fresh.model = stream.model.take();
        fresh.root = stream.root;
        fresh.stale = stream.stale;
        let old = std::mem::replace(stream, fresh);
        shared.orphans -= old.orphans.len();
        shared.irregular -= old.irregular.len();
        for key in old.irregular.keys() {
            if let Some(record) = shared.blocks.find_key(key)
                && shared.blocks.sets.kind(shared.blocks.set(record)) == Kind::Key
            {
                shared.blocks.free_if_empty(record);
            }
        }
    }

    /// Forget a renewed stream. Returns what is left to be freed, if it was the last one.
    pub fn forget_stream(&mut self, id: StreamId) -> Option<Blocks> {
        if let Some(stream) = self.streams[id as usize].take() {
            self.by_name.remove(&stream.name);
            self.free.push(id);
        }
        if !self.by_name.is_empty() {
            return None;
        }
        self.victims = Victims::default();
        self.sweep_at = None;
        Some(std::mem::replace(&mut self.shared.blocks, Blocks::new(secret::random())))
    }
}

/// Remove a copy of a block that has a record of its own, from each slot that has one. Returns whether any had.
#[inline]
fn remove_copy(shared: &mut Shared, stream: &mut Stream, slots: &[Slot], record: RecordId) -> bool {
    stream.removed_last = record;
    let mut found = false;
    for slot in slots {
        let set = shared.blocks.set(record);
        if !shared.blocks.sets.of_stream(set, stream.id).iter().any(|item| slot_in(*item) == *slot) {
            continue;
        }
        let (change, _) = shared.blocks.change(record, Op::Remove(*slot, 1, stream.young));
        found = true;
        if change.held_before && !change.held_after {
            stream.held -= 1;
            stream.retired[stream.young as usize] += 1;
        }
    }
    found
}

/// Remove up to `count` copies of a block that has no record of its own. Returns how many there were.
pub(super) fn remove_elsewhere(shared: &mut Shared, stream: &mut Stream, slot: Slot, hash: EngineHash, count: u32) -> u32 {
    if stream.irregular.get(hash).is_some() {
        let had = stream.irregular.copies_in(hash, slot);
        if had > 0 {
            let shift = stream.irregular.set_copies(shared, &stream.name.clone(), hash, slot, had.saturating_sub(count));
            if !shift.held_after {
                stream.held -= 1;
                stream.irregular.retire(hash, stream.young);
                stream.retired[stream.young as usize] += 1;
            }
        }
        return had;
    }
    let Some(orphan) = stream.orphans.get_mut(&hash) else { return 0 };
    let Some(at) = orphan.copies.iter().position(|(other, _)| *other == slot) else { return 0 };
    let had = orphan.copies[at].1;
    if had > count {
        orphan.copies[at].1 = had - count;
        return had;
    }
    orphan.copies.remove(at);
    if orphan.copies.is_empty() {
        stream.held -= 1;
        stream.orphans_resident -= 1;
        if orphan.tokens.is_none() {
            stream.orphans.remove(&hash); // nothing is known of it: it could not help anybody
            shared.orphans -= 1;
        }
    }
    had
}

pub(super) fn forget_retired(shared: &mut Shared, stream: &mut Stream, generation: u32) {
    let slot = retired(stream.id, generation);
    for set in shared.blocks.sets.take_retired(stream.id, generation) {
        let items: Vec<Item> = shared.blocks.sets.items(set).iter().copied().filter(|item| slot_in(*item) != slot).collect();
        shared.blocks.replace_set(set, &items);
    }
    stream.irregular.forget_retired(shared, &stream.name.clone(), generation);
    stream.retired[generation as usize] = 0;
}
