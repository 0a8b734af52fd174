//! A hash index of 64-bit names to record numbers, that grows by small steps: extendible hashing.
//!
//! ```text
//! directory[top bits of the hash] -> segment of 512 slots -> slot = 5 bits of the hash | 27 bits of record number
//! ```
//!
//! A full segment splits in two (some microseconds); nothing else ever moves, so no insertion pauses for long. A name may stand
//! for several records. The hash is keyed with a secret, so that nobody can choose names that collide.

use crate::memory::prefetch;
use crate::pages::{Access, PAGE, Pages};
use crate::secret::{Secret, mix};
use hashbrown::HashMap;

#[cfg(any(test, fuzzing))]
mod check;

/// A record's number: 1 to [`RECORD_MAX`].
pub type RecordId = u32;

/// Where a name falls in a table: its hash, the same in all tables with the same secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(u64);

impl Place {
    /// Where a name falls.
    #[inline]
    pub fn of(name: u64, secret: Secret) -> Self {
        Self(mix(name, secret))
    }

    /// Some bits of it.
    #[inline]
    pub fn bits(self) -> u64 {
        self.0
    }
}

/// The largest record number.
pub const RECORD_MAX: RecordId = (1 << 27) - 1;

const SEGMENT: usize = 512;
const USED_MAX: u16 = 448;
/// What a segment of a table that was made for its records holds at most, on average.
const FILLED: u16 = 384;
const TAG: u32 = !RECORD_MAX;
const EMPTY: u32 = 0;
const TOMB: u32 = 1 << 27;
/// A directory of 16 Mi entries serves more records than there are numbers.
const DEPTH_MAX: u32 = 24;

/// What is known of a segment beside its slots.
#[derive(Clone, Copy, Default)]
struct Segment {
    /// Slots that are not empty, tombs included.
    used: u16,
    live: u16,
    depth: u16,
}

#[inline]
fn home(hash: u64) -> usize {
    hash as usize % SEGMENT
}

#[inline]
fn put_slot(slots: &mut [u32; SEGMENT], hash: u64, slot: u32) {
    let mut at = home(hash);
    while slots[at] != EMPTY {
        at = (at + 1) % SEGMENT;
    }
    slots[at] = slot;
}

#[inline]
fn tag(hash: u64) -> u32 {
    (hash >> 9) as u32 & 31 << 27
}

/// Names to records.
pub struct Table {
    secret: Secret,
    depth: u32,
    directory: Vec<u32>,
    segments: Vec<Segment>,
    /// Of all segments.
    slots: Pages<u32>,
    /// Records of names that more records share than a segment holds.
    crowd: HashMap<u64, Vec<RecordId>>,
}

impl Table {
    /// An empty table.
    pub fn new(secret: Secret) -> Self {
        Self::with_room(secret, 0)
    }

    /// An empty table in which so many records find room, nearly always without a split.
    pub fn with_room(secret: Secret, records: usize) -> Self {
        let segments = records.div_ceil(usize::from(FILLED)).next_power_of_two().clamp(2, 1 << DEPTH_MAX);
        let depth = segments.ilog2();
        let (directory, crowd) = ((0..segments as u32).collect(), HashMap::new());
        let mut table = Self { secret, depth, directory, segments: Vec::new(), slots: Pages::new(Access::Anywhere), crowd };
        for _ in 0..segments {
            table.grow(depth as u16);
        }
        table
    }

    /// Add a segment. Returns its number.
    fn grow(&mut self, depth: u16) -> usize {
        self.segments.push(Segment { depth, ..Segment::default() });
        self.slots.reach(self.segments.len() * SEGMENT - 1);
        self.segments.len() - 1
    }

    #[inline]
    fn segment_of(&self, hash: u64) -> usize {
        self.directory[(hash >> (64 - self.depth)) as usize] as usize
    }

    #[inline]
    fn slots(&self, segment: usize) -> &[u32; SEGMENT] {
        const { assert!(PAGE.is_multiple_of(SEGMENT)) };
        let part = self.slots.part::<SEGMENT>(segment);
        part.expect("a page holds whole segments")
    }

    #[inline]
    fn slots_mut(&mut self, segment: usize) -> &mut [u32; SEGMENT] {
        self.slots.part_mut::<SEGMENT>(segment).expect("a page holds whole segments")
    }

    /// Put a record in a free slot of a segment. There must be one.
    #[inline]
    fn put(&mut self, segment: usize, hash: u64, id: RecordId) {
        let slots = self.slots_mut(segment);
        let mut at = home(hash);
        while slots[at] & RECORD_MAX != 0 {
            at = (at + 1) % SEGMENT;
        }
        let is_new = slots[at] == EMPTY;
        slots[at] = tag(hash) | id;
        self.segments[segment].used += u16::from(is_new);
        self.segments[segment].live += 1;
    }

    /// The first record at a name's place that `is` the one looked for.
    #[inline]
    pub fn find(&self, place: Place, mut is: impl FnMut(RecordId) -> bool) -> Option<RecordId> {
        let hash = place.0;
        let slots = self.slots(self.segment_of(hash));
        let tag = tag(hash);
        let mut at = home(hash);
        loop {
            let slot = slots[at];
            if slot == EMPTY {
                break;
            }
            let id = slot & RECORD_MAX;
            if slot & TAG == tag && id != 0 && is(id) {
                return Some(id);
            }
            at = (at + 1) % SEGMENT;
        }
        if self.crowd.is_empty() {
            return None;
        }
        self.crowd.get(&hash)?.iter().copied().find(|id| is(*id))
    }

    /// Ask for the memory in which a name's place is.
    #[inline]
    pub fn expect(&self, place: Place) {
        prefetch(&self.slots(self.segment_of(place.0))[home(place.0)]);
    }

    /// Add a record at its name's place; `names` are those of all records.
    pub fn insert(&mut self, place: Place, id: RecordId, names: &Pages<u64>) {
        let hash = place.0;
        loop {
            let at = self.segment_of(hash);
            if self.segments[at].used < USED_MAX {
                self.put(at, hash, id);
                return;
            }
            if !self.make_room(at, hash, names) {
                self.crowd.entry(hash).or_default().push(id);
                return;
            }
        }
    }

    /// Clear a full segment of tombs, or split it. False if neither would help a name with this hash.
    #[cold]
    fn make_room(&mut self, at: usize, hash: u64, names: &Pages<u64>) -> bool {
        let old = *self.slots(at);
        let Segment { live, depth, .. } = self.segments[at];
        let records = || old.iter().copied().filter(|slot| slot & RECORD_MAX != 0);
        records().for_each(|slot| prefetch(names.at(slot & RECORD_MAX)));
        let hash_of = |slot: u32| mix(*names.at(slot & RECORD_MAX), self.secret);
        if live <= USED_MAX / 4 * 3 {
            let mut fresh = [EMPTY; SEGMENT];
            records().for_each(|slot| put_slot(&mut fresh, hash_of(slot), slot));
            *self.slots_mut(at) = fresh;
            self.segments[at].used = live;
            return true;
        }
        if u32::from(depth) == DEPTH_MAX || records().all(|slot| hash_of(slot) == hash) {
            return false;
        }
        let bits = u32::from(depth) + 1;
        let mut halves = [[EMPTY; SEGMENT]; 2];
        let mut counts = [0, 0];
        for slot in records() {
            let hash = hash_of(slot);
            let half = (hash >> (64 - bits) & 1) as usize;
            put_slot(&mut halves[half], hash, slot);
            counts[half] += 1;
        }
        if bits > self.depth {
            self.directory = self.directory.iter().flat_map(|segment| [*segment; 2]).collect();
            self.depth = bits;
        }
        let upper = self.grow(depth + 1);
        for (segment, half) in [(at, 0), (upper, 1)] {
            *self.slots_mut(segment) = halves[half];
            self.segments[segment] = Segment { used: counts[half], live: counts[half], depth: depth + 1 };
        }
        let share = 1 << (self.depth - bits);
        let first = (hash >> (64 - bits) | 1) as usize * share;
        self.directory[first..first + share].fill(upper as u32);
        true
    }

    /// Take a record out. Nothing happens if it isn't there.
    pub fn remove(&mut self, place: Place, id: RecordId) {
        let hash = place.0;
        let at = self.segment_of(hash);
        let slots = self.slots_mut(at);
        if let Some(slot) = position(slots, hash, id) {
            slots[slot] = TOMB;
            let mut emptied = 0;
            if slots[(slot + 1) % SEGMENT] == EMPTY {
                let mut last = slot;
                while slots[last] == TOMB {
                    slots[last] = EMPTY;
                    emptied += 1;
                    last = (last + SEGMENT - 1) % SEGMENT;
                }
            }
            self.segments[at].live -= 1;
            self.segments[at].used -= emptied;
        } else if let Some(crowd) = self.crowd.get_mut(&hash) {
            crowd.retain(|other| *other != id);
            if crowd.is_empty() {
                self.crowd.remove(&hash);
            }
        }
    }

    /// Put a record in another's place, under the same name.
    pub fn replace(&mut self, place: Place, old: RecordId, new: RecordId) {
        let hash = place.0;
        let at = self.segment_of(hash);
        let slots = self.slots_mut(at);
        if let Some(slot) = position(slots, hash, old) {
            slots[slot] = tag(hash) | new;
        } else if let Some(crowd) = self.crowd.get_mut(&hash) {
            crowd.iter_mut().filter(|other| **other == old).for_each(|other| *other = new);
        }
    }
}

fn position(slots: &[u32; SEGMENT], hash: u64, id: RecordId) -> Option<usize> {
    let wanted = tag(hash) | id;
    let mut at = home(hash);
    while slots[at] != EMPTY {
        if slots[at] == wanted {
            return Some(at);
        }
        at = (at + 1) % SEGMENT;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::fixed;

    const MANY: RecordId = if cfg!(miri) { 2000 } else { 200_000 };
    const ALIKE: RecordId = if cfg!(miri) { 600 } else { 5000 };

    fn named(last: RecordId, name: impl Fn(RecordId) -> u64) -> Pages<u64> {
        let mut names = Pages::new(Access::InOrder);
        names.reach(last as usize);
        (1..=last).for_each(|id| *names.at_mut(id) = name(id));
        names
    }

    fn at(name: u64) -> Place {
        Place::of(name, fixed())
    }

    #[test]
    fn finds_what_was_inserted_and_not_what_was_removed() {
        let mut table = Table::new(fixed());
        let name = |id: RecordId| u64::from(id).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let names = named(MANY, name);
        for id in 1..=MANY {
            table.insert(at(name(id)), id, &names);
        }
        for id in (1..=MANY).step_by(3) {
            table.remove(at(name(id)), id);
        }
        for id in 1..=MANY {
            let found = table.find(at(name(id)), |other| other == id);
            assert_eq!(found, (id % 3 != 1).then_some(id));
        }
        for id in (1..=MANY).step_by(3) {
            table.insert(at(name(id)), id, &names);
        }
        assert!((1..=MANY).all(|id| table.find(at(name(id)), |other| other == id).is_some()));
    }

    #[test]
    fn one_name_may_stand_for_more_records_than_a_segment_holds() {
        let mut table = Table::new(fixed());
        let names = named(ALIKE, |_| 7);
        for id in 1..=ALIKE {
            table.insert(at(7), id, &names);
        }
        assert!((1..=ALIKE).all(|id| table.find(at(7), |other| other == id) == Some(id)));
        assert!(table.directory.len() <= 2, "names that can't be told apart must not grow the directory");
        for id in 1..=ALIKE {
            table.remove(at(7), id);
        }
        assert_eq!(table.find(at(7), |_| true), None);
    }

    #[test]
    fn a_record_can_take_anothers_place() {
        let mut table = Table::new(fixed());
        table.insert(at(1), 1, &named(2, |_| 1));
        table.replace(at(1), 1, 2);
        assert_eq!(table.find(at(1), |_| true), Some(2));
    }
}
