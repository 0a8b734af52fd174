//! The index, for one writer at a time: what each kind of event does to a stream. As `kvatlas.index.reference`.
//!
//! Every method is a small step, so that whoever drives it can let readers in between two.

use crate::blocks::{Blocks, Known, Link};
use crate::events::{EngineHash, Extra, GroupSpec, Tier};
use crate::keys::{BlockKey, ChainEnd, KeySchema};
use crate::promises::{Promises, StreamName};
use crate::recency::{Recency, Tick};
use crate::report::{Limits, Report, Stats};
use crate::secret;
use crate::sets::{Kind, Op, SetId};
use crate::shared::Shared;
use crate::slots::{Item, STREAMS_MAX, Slot, StreamId, is_held, item, retired, slot_in, stream_of};
use crate::stream::{Orphan, Stream, Tiers};
use crate::table::{Place, RecordId};
use crate::victims::Victims;
use hashbrown::HashMap;
use smallvec::SmallVec;
use std::ops::Range;
use std::sync::Arc;

#[cfg(any(test, fuzzing))]
mod check;

/// Blocks that a writer changes before it lets readers in: about 3 microseconds.
pub const STEP_BLOCKS: usize = crate::size(32, 4);
/// Dead records that are too few to look for.
const SWEEP_MIN: usize = crate::size(8192, 5);
/// Estimated bytes of an irregular block with its chunks.
pub const IRREGULAR_BYTES: usize = 500;
/// Estimated bytes of an orphan with 16 tokens.
pub const ORPHAN_BYTES: usize = 320;
/// Estimated bytes of a promise's record.
pub const PROMISE_BYTES: usize = 200;

/// Where a chain stands.
#[derive(Clone, Debug)]
pub enum End {
    /// After a whole index block (or at the root).
    Whole(BlockKey),
    /// In the middle of one: the engine blocks that hold what is pending.
    Within(ChainEnd, Vec<EngineHash>),
}

impl End {
    fn of(end: &ChainEnd, unfinished: &[EngineHash]) -> Self {
        if end.pending.is_empty() { Self::Whole(end.key) } else { Self::Within(end.clone(), unfinished.to_vec()) }
    }
}

/// A stored event as far as it concerns each of its blocks.
pub struct Storing<'a> {
    /// Where the copies go.
    pub slot: Slot,
    /// Tokens of one block, and of all; None if the event does not say what each block holds.
    pub naming: Option<(usize, &'a [u32])>,
    /// As [`crate::events::Stored::extras`].
    pub extras: Option<&'a [Vec<Extra>]>,
    /// Where the chain stands before the next block; None if that is not known.
    pub end: Option<End>,
    /// The hash of the block before.
    pub parent: Option<EngineHash>,
    /// The blocks that got a copy and have a record of their own, in order; 0 for others.
    pub touched: SmallVec<[RecordId; 64]>,
    /// The tick before those of the event's blocks: the first block has the latest.
    pub first_tick: Tick,
    /// All blocks were of the usual kind, and have their ticks.
    pub is_whole: bool,
}

/// A block of the usual kind, about to be stored. Names with their places.
struct Whole {
    hash: (EngineHash, Place),
    key: (BlockKey, Place),
    known: Known,
}

impl Whole {
    fn new(hash: EngineHash, place: Place) -> Self {
        Self { hash: (hash, place), key: (0, place), known: Known::ToNobody }
    }
}

/// Which places were seen before: may say so wrongly.
#[derive(Default)]
struct Seen([u64; 16]);

impl Seen {
    fn is_first(&mut self, place: Place) -> bool {
        let (word, bit) = (place.bits() as usize >> 6 & 15, 1 << (place.bits() & 63));
        let is_first = self.0[word] & bit == 0;
        self.0[word] |= bit;
        is_first
    }
}

/// All of the index.
pub struct State {
    /// What streams share.
    pub shared: Shared,
    pub(crate) streams: Vec<Option<Box<Stream>>>,
    pub(crate) by_name: HashMap<Arc<StreamName>, StreamId>,
    pub(crate) free: Vec<StreamId>,
    /// The tiers' names.
    pub tiers: Tiers,
    pub(crate) victims: Victims,
    pub(crate) evicted: [u64; 3],
    /// No key in use was used before this tick.
    not_before: Tick,
    /// The next record to sweep; None while no sweep is under way.
    sweep_at: Option<RecordId>,
}

impl State {
    /// An empty index.
    pub fn new(schema: KeySchema, limits: Limits) -> Self {
        let shared = Shared {
            schema,
            limits,
            blocks: Blocks::new(secret::random()),
            promises: Promises::new(limits.promises_max),
            recency: Recency::new(limits.ttl_s),
            now_s: 0.0,
            irregular: 0,
            orphans: 0,
            content: Vec::new(),
        };
        Self {
            shared,
            streams: Vec::new(),
            by_name: HashMap::new(),
            free: Vec::new(),
            tiers: Tiers::default(),
            victims: Victims::default(),
            evicted: [0; 3],
            not_before: 1,
            sweep_at: None,
        }
    }

    // -- streams ------------------------------------------------------------------------------------------------------

    /// A stream's number; a new one for a new name. None if there are too many.
    pub fn stream_id(&mut self, name: &StreamName) -> Option<StreamId> {
        if let Some(id) = self.by_name.get(name) {
            return Some(*id);
        }
        let id = match self.free.pop() {
            Some(id) => id,
            None if self.streams.len() == STREAMS_MAX => return None,
            None => {
                self.streams.push(None);
                self.streams.len() as StreamId - 1
            }
        };
        let name = Arc::new(name.clone());
        self.streams[id as usize] = Some(Box::new(Stream::new(id, name.clone())));
        self.by_name.insert(name, id);
        Some(id)
    }

    /// A stream's number, if it is known.
    pub fn find_stream(&self, name: &StreamName) -> Option<StreamId> {
        self.by_name.get(name).copied()
    }

    /// A known stream.
    pub fn stream(&self, id: StreamId) -> &Stream {
        self.streams[id as usize].as_ref().expect("a stream's number is used while the stream is known")
    }

    pub(crate) fn stream_mut(&mut self, id: StreamId) -> &mut Stream {
        self.parts(id).1
    }

    /// All streams.
    pub fn streams(&self) -> impl Iterator<Item = &Stream> {
        self.streams.iter().flatten().map(|stream| &**stream)
    }

    fn parts(&mut self, id: StreamId) -> (&mut Shared, &mut Stream) {
        let stream = self.streams[id as usize].as_mut().expect("a stream's number is used while the stream is known");
        (&mut self.shared, stream)
    }

    /// Take note of what a batch says of its stream.
    pub fn begin_batch(&mut self, id: StreamId, model: Option<&str>, timestamp_s: Option<f64>, now_s: f64) {
        let (shared, stream) = self.parts(id);
        shared.now_s = now_s;
        if let Some(model) = model.filter(|model| !model.is_empty())
            && stream.model.as_deref() != Some(model)
        {
            stream.model = Some(model.into());
            stream.root = None;
        }
        if let Some(timestamp_s) = timestamp_s.filter(|timestamp_s| *timestamp_s != 0.0) {
            stream.last_event_s = Some(timestamp_s);
        }
    }

    // -- stored -------------------------------------------------------------------------------------------------------

    /// Learn how a group caches.
    pub fn learn_group(&mut self, id: StreamId, group: u32, spec: GroupSpec) {
        self.stream_mut(id).learn_group(group, spec);
    }

    /// The slot of a place of a stream; None if there are too many of them.
    pub fn slot(&mut self, id: StreamId, tier: &Tier, group: u32) -> Option<Slot> {
        let tier = self.tiers.number(tier)?;
        self.stream_mut(id).slot(tier, group)
    }

    /// Where the chain of a stored event begins.
    pub fn chain_start(&mut self, id: StreamId, parent: Option<EngineHash>, adapter: Option<&str>) -> Option<End> {
        let (shared, stream) = self.parts(id);
        let Some(parent) = parent else {
            let root = match adapter.filter(|adapter| !adapter.is_empty()) {
                Some(adapter) => shared.schema.root(adapter.as_bytes()),
                None => *stream
                    .root
                    .get_or_insert_with(|| shared.schema.root(stream.model.as_deref().unwrap_or_default().as_bytes())),
            };
            return Some(End::Whole(root));
        };
        if let Some(record) = shared.blocks.find_hash(parent, id) {
            return Some(End::Whole(shared.blocks.key(record)));
        }
        stream.irregular.get(parent).map(|block| End::of(&block.end, &block.unfinished))
    }

    /// The ticks of so many uses: the one before the first.
    pub fn take_ticks(&self, count: usize) -> Tick {
        self.shared.recency.take(count as u64, self.shared.now_s)
    }

    /// Store some blocks of an event: name them if that can be done, add a copy of each.
    pub fn store_blocks(
        &mut self,
        id: StreamId,
        storing: &mut Storing,
        hashes: &[EngineHash],
        numbers: Range<usize>,
        report: &mut Report,
    ) {
        let first = numbers.start;
        let stored = self.store_whole(id, storing, hashes, numbers.clone(), report);
        for (number, hash) in hashes.iter().enumerate().take(numbers.end).skip(first + stored) {
            self.store_block(id, storing, number, *hash, report);
        }
    }

    /// Store blocks of the usual kind: one index block each, no extras, nothing that waits for them. All keys are made first, so
    /// that the processor waits for memory once for all of them. Returns how many were stored: up to the first unusual one.
    fn store_whole(
        &mut self,
        id: StreamId,
        storing: &mut Storing,
        hashes: &[EngineHash],
        numbers: Range<usize>,
        report: &mut Report,
    ) -> usize {
        let (shared, stream) = self.parts(id);
        let (Some((size, tokens)), Some(End::Whole(start))) = (storing.naming, &storing.end) else { return 0 };
        let is_usual = size == shared.schema.block_size_tokens
            && storing.extras.is_none_or(|extras| extras.iter().skip(numbers.start).take(numbers.len()).all(Vec::is_empty))
            && stream.orphans.is_empty()
            && stream.children.is_empty()
            && stream.irregular.is_empty();
        if !is_usual {
            return 0;
        }
        let mut key = *start;
        let mut blocks: SmallVec<[Whole; STEP_BLOCKS]> = SmallVec::new();
        blocks.extend(numbers.clone().map(|number| Whole::new(hashes[number], shared.blocks.place(hashes[number]))));
        blocks.iter().for_each(|block| shared.blocks.expect_hash(block.hash.1));
        // made for all, though some may be known: meanwhile the tables' memory comes
        for (block, number) in blocks.iter_mut().zip(numbers.clone()) {
            key = shared.schema.next_key(key, &tokens[number * size..(number + 1) * size], &mut shared.content);
            block.key = (key, shared.blocks.place(key));
            shared.blocks.expect_key(block.key.1);
        }
        let mut next: RecordId = 0;
        for block in &mut blocks {
            block.known = if next != 0 && shared.blocks.is_hash_of(next, block.hash.0, id) {
                Known::ToStream(next)
            } else {
                shared.blocks.find_hash_at(block.hash.1, block.hash.0, id)
            };
            if let Known::ToStream(record) = block.known {
                next = record + 1;
            }
        }
        let mut seen = Seen::default();
        let mut stored = 0;
        for (block, number) in blocks.iter().zip(numbers) {
            let link = match block.known {
                Known::ToStream(record) if shared.blocks.key(record) == block.key.0 => Link::Linked(record),
                // known by another key: what was made of the tokens after it does not hold
                Known::ToStream(_) => break,
                Known::ToNobody if seen.is_first(block.hash.1) => shared.blocks.link_new(block.hash, block.key),
                Known::ToOthers(record) if seen.is_first(block.hash.1) && shared.blocks.key(record) == block.key.0 => {
                    Link::Linked(record)
                }
                _ => shared.blocks.link(block.hash.0, block.key.0, id),
            };
            let record = match link {
                Link::Linked(record) => record,
                Link::Known(_) => break, // the event names a hash twice: the same
                Link::Full => 0,
            };
            storing.end = Some(End::Whole(block.key.0));
            storing.parent = Some(block.hash.0);
            storing.touched.push(record);
            report.stored += 1;
            stored += 1;
            if record == 0 {
                report.refused += 1;
                continue;
            }
            let primary = add_copy(shared, stream, storing.slot, record, report);
            shared.blocks.stamp_at_least(primary, storing.first_tick + (hashes.len() - number) as Tick); // a hash may come twice
        }
        stored
    }

    /// Store one block of any kind.
    fn store_block(&mut self, id: StreamId, storing: &mut Storing, number: usize, hash: EngineHash, report: &mut Report) {
        report.stored += 1;
        storing.is_whole = false;
        let (shared, stream) = self.parts(id);
        let mut record = shared.blocks.find_hash(hash, id);
        if let Some((size, tokens)) = storing.naming {
            if let Some(record) = record {
                storing.end = Some(End::Whole(shared.blocks.key(record)));
            } else if let Some(block) = stream.irregular.get(hash) {
                storing.end = Some(End::of(&block.end, &block.unfinished));
            } else {
                let tokens = &tokens[number * size..(number + 1) * size];
                let extras = storing.extras.and_then(|extras| extras.get(number)).map_or(&[][..], |extras| extras);
                match storing.end.take() {
                    Some(end) => {
                        storing.end = Some(name(shared, stream, hash, end, tokens, extras, report));
                        record = shared.blocks.find_hash(hash, id);
                    }
                    None => keep_orphan(shared, stream, hash, storing.parent, tokens, extras, report),
                }
            }
            storing.parent = Some(hash);
        }
        storing.touched.push(record.unwrap_or(0));
        match record {
            Some(record) => {
                add_copy(shared, stream, storing.slot, record, report);
            }
            None => add_elsewhere(shared, stream, storing.slot, hash, report),
        }
    }

    /// After all blocks of an event: those with these numbers count as used, the first one last.
    pub fn touch_stored(&mut self, id: StreamId, storing: &Storing, hashes: &[EngineHash], numbers: Range<usize>) {
        let (shared, stream) = self.parts(id);
        let first = numbers.start;
        let mut tick = shared.recency.take(numbers.len() as u64, shared.now_s);
        for number in numbers.rev() {
            tick += 1;
            let record = match storing.touched[number] {
                0 => shared.blocks.find_hash(hashes[number], id), // an orphan may have been adopted since
                record => Some(record),
            };
            if let Some(record) = record {
                let primary = shared.blocks.primary(record);
                if shared.blocks.sets.held(shared.blocks.set(primary)) > 0 {
                    shared.blocks.stamp(primary, tick);
                }
            } else if !stream.irregular.is_empty() {
                for key in stream.irregular.keys_of(hashes[number]).into_iter().rev() {
                    touch_key(shared, key);
                }
                tick = shared.recency.take((number - first) as u64, shared.now_s); // those that follow count as used later
            }
        }
    }

    /// Give up some orphans beyond their bound. False if those that are left are within it.
    pub fn bound_orphans(&mut self, id: StreamId, report: &mut Report) -> bool {
        let (shared, stream) = self.parts(id);
        let excess = stream.orphans.len().saturating_sub(shared.limits.orphans_max).min(STEP_BLOCKS);
        for _ in 0..excess {
            drop_oldest_orphan(shared, stream);
            report.orphans_dropped += 1;
        }
        excess == STEP_BLOCKS
    }

    /// Note that a stream will soon hold those of `keys` that it does not hold.
    pub fn promise(&mut self, name: &Arc<StreamName>, keys: &[BlockKey], end_s: f64) {
        let id = self.find_stream(name);
        let shared = &mut self.shared;
        for key in keys {
            let holds = |id| {
                let blocks = &shared.blocks;
                let primary = blocks.find_key(*key)?;
                blocks.sets.of_stream(blocks.set(primary), id).iter().any(|item| is_held(*item)).then_some(())
            };
            if id.and_then(holds).is_none() {
                shared.promises.make(*key, name, end_s);
            }
        }
    }

    // -- removed and cleared ------------------------------------------------------------------------------------------

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

    // -- drop ---------------------------------------------------------------------------------------------------------

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

    // -- giving up ----------------------------------------------------------------------------------------------------

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

    /// Estimated bytes in use.
    pub fn bytes(&self) -> usize {
        self.shared.blocks.bytes()
            + self.shared.irregular * IRREGULAR_BYTES
            + self.shared.orphans * ORPHAN_BYTES
            + self.shared.promises.records() * PROMISE_BYTES
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
            ids.for_each(|id| {
                self.shared.blocks.sweep(id);
            });
        }
        self.sweep_at = (to < self.shared.blocks.numbers()).then_some(to);
    }

    /// Whether a sweep is under way.
    pub fn is_sweeping(&self) -> bool {
        self.sweep_at.is_some()
    }

    /// Sizes.
    pub fn stats(&self) -> Stats {
        let mut pods: Vec<&str> = self.streams().map(|stream| &*stream.name.pod).collect();
        pods.sort_unstable();
        pods.dedup();
        Stats {
            blocks: self.shared.blocks.held,
            entries: self.shared.blocks.entries,
            orphans: self.streams().map(|stream| stream.orphans_resident as usize).sum(),
            speculative: self.shared.promises.len(),
            streams: self.by_name.len(),
            pods: pods.len(),
            bytes_estimated: self.bytes(),
            evicted: self.evicted,
        }
    }
}

/// Give a block its keys, then every orphan that waited for it, and for those, and so on. Returns where its chain stands.
fn name(
    shared: &mut Shared,
    stream: &mut Stream,
    hash: EngineHash,
    end: End,
    tokens: &[u32],
    extras: &[Extra],
    report: &mut Report,
) -> End {
    let first = name_one(shared, stream, hash, end, tokens, extras, report);
    let mut todo = waiting_for(stream, hash, &first);
    while let Some(next) = todo.pop() {
        let after = name_one(shared, stream, next.hash, next.end, &next.tokens, &next.extras, report);
        todo.extend(waiting_for(stream, next.hash, &after));
    }
    first
}

struct Waiting {
    hash: EngineHash,
    end: End,
    tokens: Box<[u32]>,
    extras: Box<[Extra]>,
}

fn waiting_for(stream: &mut Stream, parent: EngineHash, end: &End) -> Vec<Waiting> {
    let mut found = Vec::new();
    for hash in stream.children.remove(&parent).unwrap_or_default() {
        if let Some(orphan) = stream.orphans.get_mut(&hash)
            && let Some(tokens) = orphan.tokens.take()
        {
            found.push(Waiting { hash, end: end.clone(), tokens, extras: std::mem::take(&mut orphan.extras) });
        }
    }
    found
}

fn name_one(
    shared: &mut Shared,
    stream: &mut Stream,
    hash: EngineHash,
    end: End,
    tokens: &[u32],
    extras: &[Extra],
    report: &mut Report,
) -> End {
    let mut copies = SmallVec::new();
    if let Some(orphan) = stream.orphans.remove(&hash) {
        report.adopted += 1;
        shared.orphans -= 1;
        stream.orphans_resident -= u64::from(!orphan.copies.is_empty());
        if let Some(parent) = orphan.parent {
            stream.stop_waiting(parent, hash);
        }
        copies = orphan.copies;
    }
    let (before, unfinished) = match end {
        End::Whole(key) => (ChainEnd::at(key), Vec::new()),
        End::Within(end, unfinished) => (end, unfinished),
    };
    let mut keys = Vec::new();
    let after = shared.schema.extend(&before, tokens, extras, &mut keys);
    let is_regular = before.pending.is_empty() && tokens.len() == shared.schema.block_size_tokens;
    if !is_regular {
        let is_held = !copies.is_empty();
        let left = stream.irregular.name(shared, &stream.name, hash, after.clone(), &unfinished, &keys, copies);
        if !is_held {
            stream.irregular.retire(hash, stream.young);
            stream.retired[stream.young as usize] += 1;
        }
        return End::of(&after, &left);
    }
    let (Link::Linked(record) | Link::Known(record)) = shared.blocks.link(hash, after.key, stream.id) else {
        report.refused += 1;
        stream.held -= u64::from(!copies.is_empty());
        return End::Whole(after.key);
    };
    for (slot, count) in &copies {
        shared.blocks.change(record, Op::Add(*slot, *count));
        let primary = shared.blocks.primary(record);
        shared.held_more(&stream.name, primary, after.key);
    }
    if copies.is_empty() {
        shared.blocks.change(record, Op::Retire(retired(stream.id, stream.young)));
        stream.retired[stream.young as usize] += 1;
    }
    End::Whole(after.key)
}

/// Add a copy of a block that has a record of its own. Returns the record that says who holds it.
#[inline]
fn add_copy(shared: &mut Shared, stream: &mut Stream, slot: Slot, record: RecordId, report: &mut Report) -> RecordId {
    if !shared.promises.is_empty() {
        shared.promises.keep(shared.blocks.key(record), &stream.name);
    }
    let (change, primary) = shared.blocks.change(record, Op::Add(slot, 1));
    report.duplicates += u64::from(change.had_copies);
    stream.held += u64::from(!change.held_before);
    if let Some(generation) = change.retired_before {
        stream.retired[generation as usize] -= 1;
    }
    primary
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

fn keep_orphan(
    shared: &mut Shared,
    stream: &mut Stream,
    hash: EngineHash,
    parent: Option<EngineHash>,
    tokens: &[u32],
    extras: &[Extra],
    report: &mut Report,
) {
    match stream.orphans.get_mut(&hash) {
        Some(known) if known.tokens.is_some() => return,
        Some(known) => {
            known.parent = parent;
            known.tokens = Some(tokens.into());
            known.extras = extras.into();
        }
        None => {
            report.orphaned += 1;
            shared.orphans += 1;
            let orphan = Orphan { parent, tokens: Some(tokens.into()), extras: extras.into(), copies: SmallVec::new() };
            stream.orphans.insert(hash, orphan);
        }
    }
    if let Some(parent) = parent {
        stream.children.entry(parent).or_default().push_back(hash);
    }
}

/// Add a copy of a block that has no record of its own: an irregular one, or an orphan.
fn add_elsewhere(shared: &mut Shared, stream: &mut Stream, slot: Slot, hash: EngineHash, report: &mut Report) {
    if stream.irregular.get(hash).is_some() {
        let count = stream.irregular.copies_in(hash, slot).saturating_add(1);
        let shift = stream.irregular.set_copies(shared, &stream.name.clone(), hash, slot, count);
        report.duplicates += u64::from(shift.had_copies);
        stream.held += u64::from(!shift.held_before);
        if let Some(generation) = shift.retired_before {
            stream.retired[generation as usize] -= 1;
        }
        return;
    }
    if !stream.orphans.contains_key(&hash) {
        report.orphaned += 1;
        shared.orphans += 1;
        stream.orphans.insert(hash, Orphan::default());
    }
    let Some(orphan) = stream.orphans.get_mut(&hash) else { return };
    if orphan.copies.is_empty() {
        stream.held += 1;
        stream.orphans_resident += 1;
    }
    match orphan.copies.iter_mut().find(|(other, _)| *other == slot) {
        Some((_, count)) => {
            report.duplicates += 1;
            *count = count.saturating_add(1);
        }
        None => orphan.copies.push((slot, 1)),
    }
}

/// Remove up to `count` copies of a block that has no record of its own. Returns how many there were.
fn remove_elsewhere(shared: &mut Shared, stream: &mut Stream, slot: Slot, hash: EngineHash, count: u32) -> u32 {
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

fn drop_oldest_orphan(shared: &mut Shared, stream: &mut Stream) {
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

fn forget_retired(shared: &mut Shared, stream: &mut Stream, generation: u32) {
    let slot = retired(stream.id, generation);
    for set in shared.blocks.sets.take_retired(stream.id, generation) {
        let items: Vec<Item> = shared.blocks.sets.items(set).iter().copied().filter(|item| slot_in(*item) != slot).collect();
        shared.blocks.replace_set(set, &items);
    }
    stream.irregular.forget_retired(shared, &stream.name.clone(), generation);
    stream.retired[generation as usize] = 0;
}

fn note_gone(stream: &mut Stream, held: bool, retired: Option<u32>) {
    stream.held -= u64::from(held);
    if let Some(generation) = retired {
        stream.retired[generation as usize] -= 1;
    }
}

fn touch_key(shared: &mut Shared, key: BlockKey) {
    if let Some(primary) = shared.blocks.find_key(key)
        && shared.blocks.sets.held(shared.blocks.set(primary)) > 0
    {
        let before = shared.recency.take(1, shared.now_s);
        shared.blocks.stamp(primary, before + 1);
    }
}
