//! Holder sets: who has a block, and how many copies. Equal sets are one set, and a record names its set by number.
//!
//! A fleet has few different sets next to its blocks (the blocks of one prompt mostly lie on the same pods), so an entry costs
//! next to nothing, a walk along a prompt compares numbers, and a stream is taken out of all its blocks by taking it out of the
//! sets: a set that lost a stream *forwards* to the set without it, until the records that still name it are written next.

use crate::secret::{Secret, mix};
use crate::slots::{Item, RETIRED, Slot, StreamId, copies_in, is_held, item, place_of, retired, slot_in, stream_of};
use hashbrown::HashTable;
use smallvec::SmallVec;

#[cfg(any(test, fuzzing))]
mod check;

/// A holder set's number.
pub type SetId = u32;

/// What a set belongs to: the role of the records that name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A block key with the one engine hash that it goes by. Has retired items.
    Block,
    /// A block key that goes by several engine hashes, or none; its items sum up theirs. Has no retired items.
    Key,
    /// One of several engine hashes of a key. Has retired items.
    Name,
}

/// The empty set of each kind.
pub const EMPTY_BLOCK: SetId = 0;
/// See [`EMPTY_BLOCK`].
pub const EMPTY_KEY: SetId = 1;
/// See [`EMPTY_BLOCK`].
pub const EMPTY_NAME: SetId = 2;
/// What a free record has.
pub const FREE: SetId = 3;

const KINDS: [Kind; 3] = [Kind::Block, Kind::Key, Kind::Name];
const MEMO: usize = crate::size(1024, 16);
const GROWTH_MIN: usize = crate::size(4096, 12);

struct HolderSet {
    items: Box<[Item]>,
    /// Items that stand for copies.
    held: u32,
    kind: Kind,
    /// Itself, or the set that took its place.
    forward: SetId,
    /// Records that mean this set: those that name it or a set that forwards to it.
    refs: u32,
    /// Records that name this set.
    named: u32,
}

/// One copy more or less, or a change of what is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// So many copies more in a slot.
    Add(Slot, u32),
    /// So many copies less. In a set with retired items, a stream that has none left retires the block in `generation`.
    Remove(Slot, u32, u32),
    /// Remember the block: it is held nowhere.
    Retire(Slot),
    /// Nothing more of this stream.
    Forget(StreamId),
}

/// What an operation did.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// The set after it.
    pub set: SetId,
    /// The slot had copies before.
    pub had_copies: bool,
    /// The stream had copies before, in any of its places.
    pub held_before: bool,
    /// The stream has copies now.
    pub held_after: bool,
    /// The generation it was retired in before.
    pub retired_before: Option<u32>,
    /// What the set gained or lost in slots with copies.
    pub entries: i32,
    /// 1 if somebody holds the block now and nobody did before, -1 the other way round.
    pub held: i32,
    /// What the sets belong to.
    pub kind: Kind,
}

/// All holder sets.
pub struct Sets {
    secret: Secret,
    sets: Vec<HolderSet>,
    free: Vec<SetId>,
    interned: HashTable<SetId>,
    memo: Box<[Option<(SetId, Op, Change)>]>,
    last: Option<(SetId, Op, Change)>,
    /// Sets have gone since the memo was written.
    memo_is_old: bool,
    items: usize,
    grown_max: usize,
    /// How many sets were left when they were tidied last.
    tidied: usize,
    /// By generation: sets that were made with a retired item, for [`Sets::take_retired`]. Some may be gone since.
    retired_in: Vec<[Vec<SetId>; 2]>,
}

impl Sets {
    /// The empty ones.
    pub fn new(secret: Secret) -> Self {
        let mut sets = Self {
            secret,
            sets: Vec::new(),
            free: Vec::new(),
            interned: HashTable::new(),
            memo: vec![None; MEMO].into(),
            last: None,
            memo_is_old: false,
            items: 0,
            grown_max: GROWTH_MIN,
            tidied: 0,
            retired_in: Vec::new(),
        };
        for kind in KINDS {
            sets.intern(kind, &[]);
        }
        let nothing = HolderSet { items: Box::default(), held: 0, kind: Kind::Block, forward: FREE, refs: 0, named: 0 };
        sets.sets.push(nothing);
        sets
    }

    /// What a set is now.
    #[inline]
    pub fn resolve(&self, set: SetId) -> SetId {
        let mut set = set;
        loop {
            let forward = self.sets[set as usize].forward;
            if forward == set {
                return set;
            }
            set = forward;
        }
    }

    /// A resolved set's items, by slot.
    #[inline]
    pub fn items(&self, set: SetId) -> &[Item] {
        &self.sets[set as usize].items
    }

    /// How many slots with copies a resolved set has.
    #[inline]
    pub fn held(&self, set: SetId) -> u32 {
        self.sets[set as usize].held
    }

    /// The role of the records that name a set.
    #[inline]
    pub fn kind(&self, set: SetId) -> Kind {
        self.sets[set as usize].kind
    }

    /// How many records mean a resolved set.
    pub fn refs(&self, set: SetId) -> u32 {
        self.sets[set as usize].refs
    }

    /// One past the largest number in use.
    pub fn numbers(&self) -> SetId {
        self.sets.len() as SetId
    }

    /// What a stream has in a resolved set.
    #[inline]
    pub fn of_stream(&self, set: SetId, stream: StreamId) -> &[Item] {
        let items = self.items(set);
        match items {
            [] => items,
            [only] if stream_of(slot_in(*only)) == stream => items,
            [_] => &[],
            _ => {
                let first = items.partition_point(|item| stream_of(slot_in(*item)) < stream);
                let count = items[first..].iter().take_while(|item| stream_of(slot_in(**item)) == stream).count();
                &items[first..first + count]
            }
        }
    }

    /// A record goes from one set to another.
    #[inline]
    pub fn moved(&mut self, from: SetId, to: SetId) {
        let meant = self.resolve(from);
        self.sets[from as usize].named -= 1;
        self.sets[meant as usize].refs -= 1;
        self.named(to);
    }

    /// A new record names a set.
    #[inline]
    pub fn named(&mut self, set: SetId) {
        let set = &mut self.sets[set as usize];
        set.named += 1;
        set.refs += 1;
    }

    /// A record with a set is no more.
    #[inline]
    pub fn dropped(&mut self, set: SetId) {
        self.moved(set, FREE);
        let free = &mut self.sets[FREE as usize];
        (free.named, free.refs) = (0, 0);
    }

    /// The set that an operation makes of a resolved one.
    #[inline]
    pub fn after(&mut self, set: SetId, op: Op) -> Change {
        if let Some((of, known, change)) = self.last
            && of == set
            && known == op
        {
            return change;
        }
        let change = self.recall(set, op);
        self.last = Some((set, op, change));
        change
    }

    fn recall(&mut self, set: SetId, op: Op) -> Change {
        if std::mem::take(&mut self.memo_is_old) {
            self.memo.fill(None);
        }
        let place = match op {
            Op::Add(slot, copies) => u64::from(slot) << 2 ^ u64::from(copies) << 40,
            Op::Remove(slot, copies, generation) => {
                (u64::from(slot) << 2 | 1) ^ u64::from(copies) << 40 ^ u64::from(generation) << 39
            }
            Op::Retire(slot) => u64::from(slot) << 2 | 2,
            Op::Forget(stream) => u64::from(stream) << 2 | 3,
        };
        let place = mix(place ^ u64::from(set) << 48 ^ u64::from(set), self.secret) as usize % MEMO;
        if let Some((of, known, change)) = self.memo[place]
            && of == set
            && known == op
        {
            return change;
        }
        let change = self.work_out(set, op);
        self.memo[place] = Some((set, op, change));
        change
    }

    fn work_out(&mut self, set: SetId, op: Op) -> Change {
        let kind = self.kind(set);
        let slot = match op {
            Op::Add(slot, _) | Op::Remove(slot, ..) | Op::Retire(slot) => slot,
            Op::Forget(stream) => retired(stream, 0),
        };
        let stream = stream_of(slot);
        let mine = self.of_stream(set, stream);
        let held_before = mine.iter().any(|item| is_held(*item));
        let retired_before = mine.iter().map(|item| slot_in(*item)).find(|slot| place_of(*slot) < RETIRED).map(place_of);
        let had_copies = mine.iter().any(|item| slot_in(*item) == slot) && place_of(slot) >= RETIRED;
        let mut items: SmallVec<[Item; 16]> = self.items(set).iter().copied().collect();
        items.retain(|item| is_held(*item) || stream_of(slot_in(*item)) != stream);
        let at = items.partition_point(|item| slot_in(*item) < slot);
        let has_slot = items.get(at).is_some_and(|item| slot_in(*item) == slot);
        match op {
            Op::Add(_, copies) if has_slot => {
                items[at] = item(slot, copies_in(items[at]).saturating_add(copies));
            }
            Op::Add(_, copies) => items.insert(at, item(slot, copies)),
            Op::Retire(_) => items.insert(at, item(slot, 1)),
            Op::Remove(_, copies, _) if has_slot && copies_in(items[at]) > copies => {
                items[at] = item(slot, copies_in(items[at]) - copies);
            }
            Op::Remove(..) if has_slot => {
                items.remove(at);
            }
            Op::Remove(..) => {}
            Op::Forget(_) => items.retain(|item| stream_of(slot_in(*item)) != stream),
        }
        let held_after = items.iter().any(|item| stream_of(slot_in(*item)) == stream && is_held(*item));
        if let Op::Remove(_, _, generation) = op
            && kind != Kind::Key
            && held_before
            && !held_after
        {
            let slot = retired(stream, generation);
            items.insert(items.partition_point(|item| slot_in(*item) < slot), item(slot, 1));
        }
        let after = self.intern(kind, &items);
        let (before, now) = (self.held(set) as i32, self.held(after) as i32);
        let (entries, held) = (now - before, now.signum() - before.signum());
        Change { set: after, had_copies, held_before, held_after, retired_before, entries, held, kind }
    }

    /// The set with these items. They are sorted by slot, each slot once.
    pub fn intern(&mut self, kind: Kind, items: &[Item]) -> SetId {
        let hash = self.hash(kind, items);
        let sets = &self.sets;
        let found = self.interned.find(hash, |set| {
            let set = &sets[*set as usize];
            set.kind == kind && *set.items == *items
        });
        if let Some(set) = found {
            return *set;
        }
        let held = items.iter().filter(|item| is_held(**item)).count() as u32;
        let id = self.free.pop().unwrap_or(self.sets.len() as SetId);
        let set = HolderSet { items: items.into(), held, kind, forward: id, refs: 0, named: 0 };
        self.items += items.len();
        if id as usize == self.sets.len() {
            self.sets.push(set);
        } else {
            self.sets[id as usize] = set;
        }
        let (sets, secret) = (&self.sets, self.secret);
        self.interned.insert_unique(hash, id, |set| {
            let set = &sets[*set as usize];
            hash_of(set.kind, &set.items, secret)
        });
        for item in items.iter().filter(|item| !is_held(**item)) {
            let (stream, generation) = (stream_of(slot_in(*item)) as usize, place_of(slot_in(*item)) as usize);
            if self.retired_in.len() <= stream {
                self.retired_in.resize_with(stream + 1, Default::default);
            }
            self.retired_in[stream][generation].push(id);
        }
        id
    }

    fn hash(&self, kind: Kind, items: &[Item]) -> u64 {
        hash_of(kind, items, self.secret)
    }

    /// Let `by` take the place of a set: all records that mean the one mean the other from now on.
    pub fn forward(&mut self, set: SetId, by: SetId) {
        debug_assert!(set != by && set > FREE);
        let hash = self.hash(self.kind(set), self.items(set));
        if let Ok(known) = self.interned.find_entry(hash, |other| *other == set) {
            known.remove();
        }
        let refs = std::mem::take(&mut self.sets[set as usize].refs);
        self.sets[by as usize].refs += refs;
        let gone = &mut self.sets[set as usize];
        gone.forward = by;
        self.items -= gone.items.len();
        gone.items = Box::default();
        gone.held = 0;
        self.memo_is_old = true;
        self.last = None;
    }

    /// Shorten the way from a set that was replaced to the one that is meant.
    pub fn shorten(&mut self, set: SetId) {
        self.sets[set as usize].forward = self.resolve(set);
    }

    /// The sets in which a stream remembers blocks of a generation; they are not asked for again.
    pub fn take_retired(&mut self, stream: StreamId, generation: u32) -> Vec<SetId> {
        let Some(generations) = self.retired_in.get_mut(stream as usize) else { return Vec::new() };
        let mut found = std::mem::take(&mut generations[generation as usize]);
        found.sort_unstable();
        found.dedup();
        let slot = retired(stream, generation);
        found.retain(|set| self.sets[*set as usize].items.iter().any(|item| slot_in(*item) == slot));
        found
    }

    /// Forget the sets that no record means, if there are many. Nobody may hold a set's number through this call.
    pub fn tidy(&mut self) {
        if self.sets.len() - self.free.len() >= self.grown_max {
            self.tidy_all();
        }
    }

    /// As [`Sets::tidy`], where memory is short: sets that no record means are an eighth of all at most, and some.
    pub fn tidy_closely(&mut self) {
        let known = self.sets.len() - self.free.len();
        if known >= self.tidied + self.tidied / 8 + 64 {
            self.tidy_all();
        }
    }

    /// Forget the sets that no record means. Nobody may hold a set's number through this call.
    pub fn tidy_all(&mut self) {
        for id in 0..self.sets.len() as SetId {
            let forward = self.sets[id as usize].forward;
            if forward != id {
                self.sets[id as usize].forward = self.resolve(forward);
            }
        }
        let mut is_free = vec![false; self.sets.len()];
        self.free.iter().for_each(|id| is_free[*id as usize] = true);
        for id in FREE + 1..self.sets.len() as SetId {
            let set = &self.sets[id as usize];
            if set.named > 0 || set.refs > 0 || is_free[id as usize] {
                continue;
            }
            let hash = self.hash(set.kind, &set.items);
            if let Ok(known) = self.interned.find_entry(hash, |other| *other == id) {
                known.remove();
            }
            let gone = &mut self.sets[id as usize];
            self.items -= gone.items.len();
            gone.items = Box::default();
            gone.held = 0;
            gone.forward = id;
            self.free.push(id);
        }
        self.tidied = self.sets.len() - self.free.len();
        self.grown_max = GROWTH_MIN.max(2 * self.tidied);
        self.memo_is_old = true;
        self.last = None;
        for generations in &mut self.retired_in {
            for known in generations {
                let sets = &self.sets;
                known.sort_unstable();
                known.dedup();
                known.retain(|set| !sets[*set as usize].items.is_empty());
                known.shrink_to_fit();
            }
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let known = self.sets.len() - self.free.len();
        known.saturating_sub(4) * (size_of::<HolderSet>() + 24) + self.items * size_of::<Item>()
    }
}

fn hash_of(kind: Kind, items: &[Item], secret: Secret) -> u64 {
    items.iter().fold(mix(kind as u64, secret), |hash, item| mix(hash.rotate_left(17) ^ item, secret))
}
