//! Records of blocks: block key, engine hash, holder set, last use. Found by key and by hash.
//!
//! ```text
//! Block  (key, hash, set)          a key that goes by one hash: nearly every record
//! Key    (key, ─, set) ─> names    a key that goes by several hashes (or by those of an irregular block, kept elsewhere)
//! Name   (key record, hash, set)   one of those hashes; between two others in the list
//! ```
//!
//! The parts of records lie in arrays of their own: a chain's records are mostly numbered one after the other, so walking along
//! it reads every cache line to its end. 28 bytes a record, and 2 x 4 bytes at a load of about 0.65 to find it.

use crate::events::EngineHash;
use crate::keys::BlockKey;
use crate::pages::{Access, PAGE, Pages};
use crate::recency::Tick;
use crate::secret::Secret;
use crate::sets::{Change, EMPTY_BLOCK, EMPTY_KEY, EMPTY_NAME, FREE, Kind, Op, SetId, Sets};
use crate::slots::{Item, StreamId, copies_in, is_held, slot_in};
use crate::table::{Place, RECORD_MAX, RecordId, Table};
use smallvec::SmallVec;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[cfg(any(test, fuzzing))]
mod check;
#[cfg(any(test, fuzzing))]
pub use check::Copies;

/// Estimated bytes of a record: its parts, and its slots in both tables.
pub const RECORD_BYTES: usize = 42;

/// The largest number that is given to a record.
const NUMBERS_MAX: RecordId = crate::size(RECORD_MAX as usize, 700) as RecordId;

/// Who knows a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// The stream, by this record.
    ToStream(RecordId),
    /// Only other streams, one of them by this record.
    ToOthers(RecordId),
    /// No stream.
    ToNobody,
}

/// The record by which a stream knows a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// It does from now on.
    Linked(RecordId),
    /// It did before, maybe by another key.
    Known(RecordId),
    /// There are no more record numbers.
    Full,
}

/// Why a record was not restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There are no more record numbers.
    Full,
    /// The key has a record.
    Known,
}

/// All records.
pub struct Blocks {
    secret: Secret,
    keys: Pages<u64>,
    hashes: Pages<u64>,
    sets_of: Pages<SetId>,
    stamps: Pages<AtomicU64>,
    by_key: Table,
    by_hash: Table,
    /// One past the largest number ever used.
    numbers: RecordId,
    first_free: RecordId,
    allocated: usize,
    /// The holder sets.
    pub sets: Sets,
    /// (key, slot) pairs with copies.
    pub entries: usize,
    /// Keys with a holder.
    pub held: usize,
}

impl Blocks {
    /// No records.
    pub fn new(secret: Secret) -> Self {
        Self {
            secret,
            keys: Pages::new(Access::InOrder),
            hashes: Pages::new(Access::InOrder),
            sets_of: Pages::new(Access::InOrder),
            stamps: Pages::new(Access::InOrder),
            by_key: Table::new(secret),
            by_hash: Table::new(secret),
            numbers: 1,
            first_free: 0,
            allocated: 0,
            sets: Sets::new(secret),
            entries: 0,
            held: 0,
        }
    }

    /// The set of a record, as it is now.
    #[inline]
    pub fn set(&self, id: RecordId) -> SetId {
        self.sets.resolve(*self.sets_of.at(id))
    }

    /// The engine hash of a Block or a Name.
    #[inline]
    pub fn hash(&self, id: RecordId) -> EngineHash {
        *self.hashes.at(id)
    }

    /// The key of a record of any kind.
    #[inline]
    pub fn key(&self, id: RecordId) -> BlockKey {
        match self.sets.kind(*self.sets_of.at(id)) {
            Kind::Name => *self.keys.at(*self.keys.at(id) as RecordId),
            _ => *self.keys.at(id),
        }
    }

    /// The key of a Block or Key.
    #[inline]
    pub fn key_of_primary(&self, id: RecordId) -> BlockKey {
        *self.keys.at(id)
    }

    /// The record that says who holds the block: the record itself, or of a Name its Key.
    #[inline]
    pub fn primary(&self, id: RecordId) -> RecordId {
        match self.sets.kind(*self.sets_of.at(id)) {
            Kind::Name => *self.keys.at(id) as RecordId,
            _ => id,
        }
    }

    /// Where a key or a hash falls in its table.
    #[inline]
    pub fn place(&self, name: u64) -> Place {
        Place::of(name, self.secret)
    }

    /// The Block or Key with a key, if there is one, held or not.
    #[inline]
    pub fn find_key(&self, key: BlockKey) -> Option<RecordId> {
        self.find_key_at(self.place(key), key)
    }

    /// As [`Blocks::find_key`], at the key's place.
    #[inline]
    pub fn find_key_at(&self, place: Place, key: BlockKey) -> Option<RecordId> {
        self.by_key.find(place, |id| *self.keys.at(id) == key)
    }

    /// Ask for the memory that finding or adding a key needs.
    #[inline]
    pub fn expect_key(&self, place: Place) {
        self.by_key.expect(place);
    }

    /// Ask for the memory that finding or adding a hash needs.
    #[inline]
    pub fn expect_hash(&self, place: Place) {
        self.by_hash.expect(place);
    }

    /// Whether a record is the Block or Key of a key. A chain's records are mostly numbered one after the other: looking there
    /// first saves the look into the table.
    #[inline]
    pub fn is_key_of(&self, id: RecordId, key: BlockKey) -> bool {
        (1..self.numbers).contains(&id) && *self.keys.at(id) == key && {
            let set = *self.sets_of.at(id);
            set != FREE && self.sets.kind(set) != Kind::Name
        }
    }

    /// Whether a stream knows a hash by a record. As [`Blocks::is_key_of`].
    #[inline]
    pub fn is_hash_of(&self, id: RecordId, hash: EngineHash, stream: StreamId) -> bool {
        (1..self.numbers).contains(&id) && *self.hashes.at(id) == hash && {
            let set = self.set(id);
            set != FREE && self.sets.kind(set) != Kind::Key && !self.sets.of_stream(set, stream).is_empty()
        }
    }

    /// The record by which a stream knows a hash: it holds the block or remembers it.
    #[inline]
    pub fn find_hash(&self, hash: EngineHash, stream: StreamId) -> Option<RecordId> {
        match self.find_hash_at(self.place(hash), hash, stream) {
            Known::ToStream(id) => Some(id),
            Known::ToOthers(_) | Known::ToNobody => None,
        }
    }

    /// Who knows a hash.
    #[inline]
    pub fn find_hash_at(&self, place: Place, hash: EngineHash, stream: StreamId) -> Known {
        let mut known = Known::ToNobody;
        self.by_hash.find(place, |id| {
            if *self.hashes.at(id) != hash {
                return false;
            }
            let is_mine = !self.sets.of_stream(self.set(id), stream).is_empty();
            known = if is_mine { Known::ToStream(id) } else { Known::ToOthers(id) };
            is_mine
        });
        known
    }

    /// Make sure that a key goes by a hash for a stream, which gets something in the record's set at once.
    pub fn link(&mut self, hash: EngineHash, key: BlockKey, stream: StreamId) -> Link {
        let mut same_key = None;
        let known = self.by_hash.find(self.place(hash), |id| {
            if *self.hashes.at(id) != hash {
                return false;
            }
            let is_mine = !self.sets.of_stream(self.set(id), stream).is_empty();
            if !is_mine && self.key(id) == key {
                same_key = Some(id); // but the stream may know the hash by another key, in a record further on
            }
            is_mine
        });
        match (known, same_key) {
            (Some(id), _) => Link::Known(id),
            (None, Some(id)) => Link::Linked(id),
            (None, None) => self.link_new((hash, self.place(hash)), (key, self.place(key))),
        }
    }

    /// As [`Blocks::link`], for a hash that nobody knows. Each with its place.
    #[inline]
    pub fn link_new(&mut self, hash: (EngineHash, Place), key: (BlockKey, Place)) -> Link {
        let found = match self.find_key_at(key.1, key.0) {
            None => self.new_block(hash, key),
            Some(primary) => self.new_name(hash, primary),
        };
        found.map_or(Link::Full, Link::Linked)
    }

    #[inline]
    fn new_block(&mut self, hash: (EngineHash, Place), key: (BlockKey, Place)) -> Option<RecordId> {
        let id = self.allocate(key.0, hash.0, EMPTY_BLOCK)?;
        self.index_key(key.1, id);
        self.index_hash(hash.1, id);
        Some(id)
    }

    fn new_name(&mut self, hash: (EngineHash, Place), primary: RecordId) -> Option<RecordId> {
        let key_record = self.split(primary)?;
        let name = self.allocate(u64::from(key_record), hash.0, EMPTY_NAME)?;
        self.chain(key_record, 0, name, *self.hashes.at(key_record) as RecordId);
        self.index_hash(hash.1, name);
        Some(name)
    }

    /// Put a Name between two others of its Key, or at either end (0). A Name has no stamp: its neighbours stand there.
    fn chain(&mut self, key_record: RecordId, before: RecordId, name: RecordId, after: RecordId) {
        self.stamps.at(name).store(u64::from(before) << 32 | u64::from(after), Relaxed);
        self.join(key_record, before, name);
        self.join(key_record, name, after);
    }

    /// Make two Names of a Key neighbours; 0 stands for either end of its list.
    fn join(&mut self, key_record: RecordId, before: RecordId, after: RecordId) {
        if before == 0 {
            *self.hashes.at_mut(key_record) = u64::from(after);
        } else {
            let stamp = self.stamps.at(before);
            stamp.store(stamp.load(Relaxed) >> 32 << 32 | u64::from(after), Relaxed);
        }
        if after != 0 {
            let stamp = self.stamps.at(after);
            stamp.store(u64::from(before) << 32 | stamp.load(Relaxed) & u64::from(u32::MAX), Relaxed);
        }
    }

    /// The Key of a key, made if there is none: for blocks that are named elsewhere.
    pub fn key_record(&mut self, key: BlockKey) -> Option<RecordId> {
        match self.find_key(key) {
            Some(primary) => self.split(primary),
            None => {
                let id = self.allocate(key, 0, EMPTY_KEY)?;
                self.index_key(self.place(key), id);
                Some(id)
            }
        }
    }

    /// Make a Block a Key with one Name. A Key stays what it is.
    fn split(&mut self, primary: RecordId) -> Option<RecordId> {
        let set = self.set(primary);
        if self.sets.kind(set) == Kind::Key {
            return Some(primary);
        }
        let key = *self.keys.at(primary);
        let items = self.sets.items(set).to_vec();
        let held: Vec<_> = items.iter().copied().filter(|item| is_held(*item)).collect();
        let key_set = self.sets.intern(Kind::Key, &held);
        let name_set = self.sets.intern(Kind::Name, &items);
        let key_record = self.allocate(key, u64::from(primary), key_set)?;
        let stamp = self.stamps.at(primary).swap(0, Relaxed);
        self.stamps.at(key_record).store(stamp, Relaxed);
        self.by_key.replace(Place::of(key, self.secret), primary, key_record);
        *self.keys.at_mut(primary) = u64::from(key_record);
        self.assign(primary, name_set);
        Some(key_record)
    }

    fn allocate(&mut self, key: u64, hash: u64, set: SetId) -> Option<RecordId> {
        let id = if self.first_free != 0 {
            let id = self.first_free;
            self.first_free = *self.hashes.at(id) as RecordId;
            id
        } else if self.numbers <= NUMBERS_MAX {
            let id = self.numbers;
            self.numbers += 1;
            if id == 1 || (id as usize).is_multiple_of(PAGE) {
                self.keys.reach(id as usize);
                self.hashes.reach(id as usize);
                self.sets_of.reach(id as usize);
                self.stamps.reach(id as usize);
            }
            id
        } else {
            return None;
        };
        self.allocated += 1;
        *self.keys.at_mut(id) = key;
        *self.hashes.at_mut(id) = hash;
        *self.sets_of.at_mut(id) = set;
        *self.stamps.at_mut(id) = AtomicU64::new(0);
        self.sets.named(set);
        Some(id)
    }

    #[inline]
    fn index_key(&mut self, place: Place, id: RecordId) {
        self.by_key.insert(place, id, &self.keys);
    }

    #[inline]
    fn index_hash(&mut self, place: Place, id: RecordId) {
        self.by_hash.insert(place, id, &self.hashes);
    }

    /// Give a record another set. Counts nothing.
    #[inline]
    fn assign(&mut self, id: RecordId, set: SetId) {
        let place = self.sets_of.at_mut(id);
        if *place != set {
            self.sets.moved(*place, set);
            *place = set;
        }
    }

    /// Apply an operation to a Block or a Name, and what it changes to the Name's Key. Also returns the Block or Key.
    #[inline]
    pub fn change(&mut self, id: RecordId, op: Op) -> (Change, RecordId) {
        let change = self.change_set(id, op);
        if change.kind == Kind::Block {
            self.count(&change);
            return (change, id);
        }
        let key_record = *self.keys.at(id) as RecordId;
        if matches!(op, Op::Add(..) | Op::Remove(..)) {
            self.change_primary(key_record, op);
        }
        (change, key_record)
    }

    /// Apply an operation to a Key.
    pub fn change_primary(&mut self, id: RecordId, op: Op) {
        let change = self.change_set(id, op);
        self.count(&change);
    }

    #[inline]
    fn change_set(&mut self, id: RecordId, op: Op) -> Change {
        let change = self.sets.after(self.set(id), op);
        self.assign(id, change.set);
        change
    }

    /// Take all that a stream has out of a Block or a Name. Returns whether it was held, and how it was retired.
    pub fn take_out(&mut self, id: RecordId, stream: StreamId) -> (bool, Option<u32>) {
        let set = self.set(id);
        let mine: SmallVec<[Item; 4]> = SmallVec::from_slice(self.sets.of_stream(set, stream));
        let change = self.sets.after(set, Op::Forget(stream));
        self.assign(id, change.set);
        if self.sets.kind(set) == Kind::Block {
            self.count(&change);
        } else {
            for item in mine.into_iter().filter(|item| is_held(*item)) {
                self.change_primary(*self.keys.at(id) as RecordId, Op::Remove(slot_in(item), copies_in(item), 0));
            }
        }
        (change.held_before, change.retired_before)
    }

    #[inline]
    fn count(&mut self, change: &Change) {
        self.entries = self.entries.wrapping_add_signed(change.entries as isize);
        self.held = self.held.wrapping_add_signed(change.held as isize);
    }

    /// Let a set forward to the one with other items, and count what that changes. Returns (records, slots with copies less).
    pub fn replace_set(&mut self, set: SetId, items: &[Item]) -> (usize, usize) {
        let kind = self.sets.kind(set);
        let refs = self.sets.refs(set) as usize;
        let before = self.sets.held(set) as usize;
        let by = self.sets.intern(kind, items);
        let after = self.sets.held(by) as usize;
        if kind != Kind::Name {
            self.entries = self.entries + refs * after - refs * before;
            self.held -= refs * (usize::from(before > 0) - usize::from(after > 0));
        }
        self.sets.forward(set, by);
        (refs, before - after)
    }

    // -- use ----------------------------------------------------------------------------------------------------------

    /// Note that a Block or Key was used.
    #[inline]
    pub fn stamp(&self, primary: RecordId, tick: Tick) {
        self.stamps.at(primary).store(tick, Relaxed);
    }

    /// Note that a Block or Key was used, if nothing later is known: a query may name a key twice.
    #[inline]
    pub fn stamp_at_least(&self, primary: RecordId, tick: Tick) {
        let stamp = self.stamps.at(primary);
        if stamp.load(Relaxed) < tick {
            stamp.store(tick, Relaxed);
        }
    }

    /// When a Block or Key was used last.
    #[inline]
    pub fn stamp_of(&self, primary: RecordId) -> Tick {
        self.stamps.at(primary).load(Relaxed)
    }

    /// Whether a record is a Block or Key that somebody holds.
    #[inline]
    pub fn is_held_primary(&self, id: RecordId) -> bool {
        let set = self.set(id);
        set != FREE && self.sets.held(set) > 0 && self.sets.kind(set) != Kind::Name
    }

    /// One past the largest record number.
    pub fn numbers(&self) -> RecordId {
        self.numbers
    }

    // -- restoring ----------------------------------------------------------------------------------------------------

    /// Make room for so many keys and hashes at once. For no records only.
    pub fn make_room(&mut self, keys: usize, hashes: usize) {
        self.by_key = Table::with_room(self.secret, keys);
        self.by_hash = Table::with_room(self.secret, hashes);
    }

    /// Ask for the memory in which both names of a record are found.
    #[inline]
    pub fn expect_record(&self, key: Place, hash: Place) {
        self.by_key.expect(key);
        self.by_hash.expect(hash);
    }

    /// A Block as it was. Names with their places.
    #[inline]
    pub fn restore_block(
        &mut self,
        key: (BlockKey, Place),
        hash: (EngineHash, Place),
        set: SetId,
        tick: Tick,
    ) -> Result<(), Refused> {
        let id = self.restore_primary(key, hash.0, set, tick)?;
        self.index_hash(hash.1, id);
        let held = self.sets.held(set) as usize;
        self.entries += held;
        self.held += usize::from(held > 0);
        Ok(())
    }

    /// A Key that nobody holds yet.
    pub fn restore_key(&mut self, key: BlockKey, tick: Tick) -> Result<RecordId, Refused> {
        self.restore_primary((key, self.place(key)), 0, EMPTY_KEY, tick)
    }

    #[inline]
    fn restore_primary(&mut self, key: (BlockKey, Place), hash: u64, set: SetId, tick: Tick) -> Result<RecordId, Refused> {
        if self.find_key_at(key.1, key.0).is_some() {
            return Err(Refused::Known);
        }
        let id = self.allocate(key.0, hash, set).ok_or(Refused::Full)?;
        self.stamp(id, tick);
        self.index_key(key.1, id);
        Ok(id)
    }

    /// The next Name of a Key, behind the one `before`; the Key's holders follow.
    pub fn restore_name(
        &mut self,
        key_record: RecordId,
        before: Option<RecordId>,
        hash: EngineHash,
        set: SetId,
    ) -> Result<RecordId, Refused> {
        let name = self.allocate(u64::from(key_record), hash, set).ok_or(Refused::Full)?;
        self.chain(key_record, before.unwrap_or(0), name, 0);
        self.index_hash(self.place(hash), name);
        let items: SmallVec<[Item; 4]> = SmallVec::from_slice(self.sets.items(set));
        for item in items.into_iter().filter(|item| is_held(*item)) {
            self.change_primary(key_record, Op::Add(slot_in(item), copies_in(item)));
        }
        Ok(name)
    }

    // -- giving up ----------------------------------------------------------------------------------------------------

    /// The Names of a Key.
    pub fn names(&self, key_record: RecordId) -> impl Iterator<Item = RecordId> {
        let mut next = *self.hashes.at(key_record) as RecordId;
        std::iter::from_fn(move || {
            let name = (next != 0).then_some(next)?;
            next = self.stamps.at(name).load(Relaxed) as RecordId;
            Some(name)
        })
    }

    /// Free a record if nothing is left of it. Returns whether it is free.
    pub fn free_if_empty(&mut self, id: RecordId) -> bool {
        match self.set(id) {
            EMPTY_BLOCK => {
                self.by_key.remove(Place::of(*self.keys.at(id), self.secret), id);
                self.by_hash.remove(Place::of(*self.hashes.at(id), self.secret), id);
                self.free(id);
            }
            EMPTY_NAME => {
                let key_record = *self.keys.at(id) as RecordId;
                self.unlink(key_record, id);
                self.by_hash.remove(Place::of(*self.hashes.at(id), self.secret), id);
                self.free(id);
                self.free_if_empty(key_record);
            }
            EMPTY_KEY if *self.hashes.at(id) == 0 => {
                self.by_key.remove(Place::of(*self.keys.at(id), self.secret), id);
                self.free(id);
            }
            set => return set == FREE,
        }
        true
    }

    fn unlink(&mut self, key_record: RecordId, name: RecordId) {
        let stamp = self.stamps.at(name).load(Relaxed);
        self.join(key_record, (stamp >> 32) as RecordId, stamp as RecordId);
    }

    fn free(&mut self, id: RecordId) {
        self.sets.dropped(*self.sets_of.at(id));
        *self.sets_of.at_mut(id) = FREE;
        *self.hashes.at_mut(id) = u64::from(self.first_free);
        self.first_free = id;
        self.allocated -= 1;
    }

    /// Records that nobody holds or remembers any more, and that are not free yet.
    pub fn dead(&self) -> usize {
        (self.sets.refs(EMPTY_BLOCK) + self.sets.refs(EMPTY_NAME)) as usize
    }

    /// Records in use, dead ones included.
    pub fn allocated(&self) -> usize {
        self.allocated
    }

    /// Ask for the memory that freeing the dead ones of these records needs.
    pub fn expect_dead(&self, ids: std::ops::Range<RecordId>) {
        for id in ids.filter(|id| self.set(*id) == EMPTY_BLOCK) {
            self.expect_record(self.place(*self.keys.at(id)), self.place(*self.hashes.at(id)));
        }
    }

    /// Free a dead record; let another name the set that it means.
    pub fn sweep(&mut self, id: RecordId) {
        if !self.free_if_empty(id) {
            self.assign(id, self.set(id));
        }
    }

    /// Estimated bytes.
    pub fn bytes(&self) -> usize {
        self.allocated * RECORD_BYTES + self.sets.bytes()
    }
}
