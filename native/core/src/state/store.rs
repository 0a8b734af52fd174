//! Blocks stored: named where the event says what they hold, and counted where it says they lie.

use super::STEP_BLOCKS;
use super::State;
use super::evict::drop_oldest_orphan;
use super::naming::name;
use crate::blocks::{Known, Link};
use crate::events::{EngineHash, Extra, GroupSpec, Tier};
use crate::keys::{BlockKey, ChainEnd};
use crate::recency::Tick;
use crate::report::Report;
use crate::sets::Op;
use crate::shared::Shared;
use crate::slots::{Slot, StreamId};
use crate::stream::{Orphan, Stream};
use crate::table::{Place, RecordId};
use smallvec::SmallVec;
use std::ops::Range;

/// Where a chain stands.
#[derive(Clone, Debug)]
pub enum End {
    /// After a whole index block (or at the root).
    Whole(BlockKey),
    /// In the middle of one: the engine blocks that hold what is pending.
    Within(ChainEnd, Vec<EngineHash>),
}

impl End {
    pub(super) fn of(end: &ChainEnd, unfinished: &[EngineHash]) -> Self {
        if end.pending.is_empty() { Self::Whole(end.key) } else { Self::Within(end.clone(), unfinished.to_vec()) }
    }
}

/// What gives an event's blocks their keys.
#[derive(Clone, Copy)]
pub enum Naming<'a> {
    /// Their tokens: of one block, and of all.
    Tokens(usize, &'a [u32]),
    /// Their hashes, which are their keys.
    Hashes,
    /// Nothing: the event does not say what each block holds.
    Nothing,
}

/// A stored event as far as it concerns each of its blocks.
pub struct Storing<'a> {
    /// Where the copies go.
    pub slot: Slot,
    /// What gives its blocks their keys.
    pub naming: Naming<'a>,
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

impl State {
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
        let (chain, is_usual) = match (storing.naming, &storing.end) {
            (Naming::Hashes, _) => (None, true),
            (Naming::Tokens(size, tokens), Some(End::Whole(start))) => {
                (Some((*start, tokens)), size == shared.schema.block_size_tokens)
            }
            _ => return 0,
        };
        let is_usual = is_usual
            && storing.extras.is_none_or(|extras| extras.iter().skip(numbers.start).take(numbers.len()).all(Vec::is_empty))
            && stream.orphans.is_empty()
            && stream.children.is_empty()
            && stream.irregular.is_empty();
        if !is_usual {
            return 0;
        }
        let size = shared.schema.block_size_tokens;
        let mut key = chain.map_or(0, |(start, _)| start);
        let mut blocks: SmallVec<[Whole; STEP_BLOCKS]> = SmallVec::new();
        blocks.extend(numbers.clone().map(|number| Whole::new(hashes[number], shared.blocks.place(hashes[number]))));
        blocks.iter().for_each(|block| shared.blocks.expect_hash(block.hash.1));
        // made for all, though some may be known: meanwhile the tables' memory comes
        for (block, number) in blocks.iter_mut().zip(numbers.clone()) {
            key = match chain {
                Some((_, tokens)) => {
                    shared.schema.next_key(key, &tokens[number * size..(number + 1) * size], &mut shared.content)
                }
                None => block.hash.0,
            };
            block.key = (key, shared.blocks.place(key));
            shared.blocks.expect_key(block.key.1);
        }
        let mut next: RecordId = 0;
        for block in &mut blocks {
            block.known = if shared.blocks.is_hash_of(next, block.hash.0, id) {
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
        if let Naming::Hashes = storing.naming {
            record = match shared.blocks.link(hash, hash, stream.id) {
                Link::Linked(record) | Link::Known(record) => Some(record),
                Link::Full => {
                    report.refused += 1;
                    storing.touched.push(0);
                    return;
                }
            };
        }
        if let Naming::Tokens(size, tokens) = storing.naming {
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
    stream.recall(change.retired_before);
    primary
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
        stream.recall(shift.retired_before);
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

fn touch_key(shared: &mut Shared, key: BlockKey) {
    if let Some(primary) = shared.blocks.find_key(key)
        && shared.blocks.sets.held(shared.blocks.set(primary)) > 0
    {
        let before = shared.recency.take(1, shared.now_s);
        shared.blocks.stamp(primary, before + 1);
    }
}
