//! A hash index of 64-bit names to record numbers, that grows by small steps: extendible hashing.
//!
//! ```text
//! directory[top bits of the hash] -> segment of 512 slots -> slot = 5 bits of the hash | 27 bits of record number
//! ```
//!
//! A full segment splits in two (some microseconds); nothing else ever moves, so no insertion pauses for long. A name may stand
//! for several records. The hash is keyed with a secret, so that nobody can choose names that collide.

use crate::secret::{Secret, mix};
use hashbrown::HashMap;

/// A record's number: 1 to [`RECORD_MAX`].
pub type RecordId = u32;

/// The largest record number.
pub const RECORD_MAX: RecordId = (1 << 27) - 1;

const SEGMENT: usize = 512;
const USED_MAX: u16 = 448;
const TAG: u32 = !RECORD_MAX;
const EMPTY: u32 = 0;
const TOMB: u32 = 1 << 27;
/// A directory of 16 Mi entries serves more records than there are numbers.
const DEPTH_MAX: u32 = 24;

struct Segment {
    slots: Box<[u32; SEGMENT]>,
    depth: u32,
    /// Slots that are not empty, tombs included.
    used: u16,
    live: u16,
}

impl Segment {
    fn new(depth: u32) -> Self {
        Self { slots: Box::new([EMPTY; SEGMENT]), depth, used: 0, live: 0 }
    }

    /// Put a record in a free slot. There must be one.
    fn put(&mut self, hash: u64, id: RecordId) {
        let mut at = home(hash);
        while self.slots[at] & RECORD_MAX != 0 {
            at = (at + 1) % SEGMENT;
        }
        self.used += u16::from(self.slots[at] == EMPTY);
        self.live += 1;
        self.slots[at] = tag(hash) | id;
    }
}

#[inline]
fn home(hash: u64) -> usize {
    hash as usize % SEGMENT
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
    /// Records of names that more records share than a segment holds.
    crowd: HashMap<u64, Vec<RecordId>>,
}

impl Table {
    /// An empty table.
    pub fn new(secret: Secret) -> Self {
        Self {
            secret,
            depth: 1,
            directory: vec![0, 1],
            segments: vec![Segment::new(1), Segment::new(1)],
            crowd: HashMap::new(),
        }
    }

    #[inline]
    fn segment_of(&self, hash: u64) -> usize {
        self.directory[(hash >> (64 - self.depth)) as usize] as usize
    }

    /// The first record of a name that `is` the one looked for.
    #[inline]
    pub fn find(&self, name: u64, mut is: impl FnMut(RecordId) -> bool) -> Option<RecordId> {
        let hash = mix(name, self.secret);
        let slots = &self.segments[self.segment_of(hash)].slots;
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

    /// What the home slot of a name holds: looked at ahead of time, it is in the processor's cache when it is needed.
    #[inline]
    pub fn first_guess(&self, name: u64) -> RecordId {
        let hash = mix(name, self.secret);
        self.segments[self.segment_of(hash)].slots[home(hash)] & RECORD_MAX
    }

    /// Add a record under a name; `name_of` tells the names of those already here.
    pub fn insert(&mut self, name: u64, id: RecordId, name_of: impl Fn(RecordId) -> u64) {
        let hash = mix(name, self.secret);
        loop {
            let at = self.segment_of(hash);
            let segment = &mut self.segments[at];
            if segment.used < USED_MAX {
                segment.put(hash, id);
                return;
            }
            let here: Vec<(u64, RecordId)> = segment
                .slots
                .iter()
                .map(|slot| slot & RECORD_MAX)
                .filter(|id| *id != 0)
                .map(|id| (mix(name_of(id), self.secret), id))
                .collect();
            let crowded = segment.depth == DEPTH_MAX || here.iter().all(|(other, _)| *other == hash);
            if segment.live > USED_MAX / 4 * 3 && crowded {
                self.crowd.entry(hash).or_default().push(id);
                return;
            }
            if segment.live > USED_MAX / 4 * 3 {
                self.split(at, &here);
            } else {
                let depth = segment.depth;
                self.refill(at, depth, here.into_iter());
            }
        }
    }

    fn refill(&mut self, at: usize, depth: u32, records: impl Iterator<Item = (u64, RecordId)>) {
        let segment = &mut self.segments[at];
        segment.slots.fill(EMPTY);
        (segment.depth, segment.used, segment.live) = (depth, 0, 0);
        for (hash, id) in records {
            segment.put(hash, id);
        }
    }

    fn split(&mut self, at: usize, here: &[(u64, RecordId)]) {
        let depth = self.segments[at].depth + 1;
        if depth > self.depth {
            self.directory = self.directory.iter().flat_map(|segment| [*segment; 2]).collect();
            self.depth = depth;
        }
        let is_upper = |hash: u64| hash >> (64 - depth) & 1 == 1;
        let upper = self.segments.len();
        self.segments.push(Segment::new(depth));
        self.refill(upper, depth, here.iter().copied().filter(|(hash, _)| is_upper(*hash)));
        self.refill(at, depth, here.iter().copied().filter(|(hash, _)| !is_upper(*hash)));
        let share = 1 << (self.depth - depth);
        let first = (here[0].0 >> (64 - depth) | 1) as usize * share;
        self.directory[first..first + share].fill(upper as u32);
    }

    /// Take a record out. Nothing happens if it isn't there.
    pub fn remove(&mut self, name: u64, id: RecordId) {
        let hash = mix(name, self.secret);
        let at = self.segment_of(hash);
        let segment = &mut self.segments[at];
        if let Some(slot) = position(&segment.slots, hash, id) {
            segment.live -= 1;
            segment.slots[slot] = TOMB;
            if segment.slots[(slot + 1) % SEGMENT] == EMPTY {
                let mut last = slot;
                while segment.slots[last] == TOMB {
                    segment.slots[last] = EMPTY;
                    segment.used -= 1;
                    last = (last + SEGMENT - 1) % SEGMENT;
                }
            }
        } else if let Some(crowd) = self.crowd.get_mut(&hash) {
            crowd.retain(|other| *other != id);
            if crowd.is_empty() {
                self.crowd.remove(&hash);
            }
        }
    }

    /// Put a record in another's place, under the same name.
    pub fn replace(&mut self, name: u64, old: RecordId, new: RecordId) {
        let hash = mix(name, self.secret);
        let at = self.segment_of(hash);
        if let Some(slot) = position(&self.segments[at].slots, hash, old) {
            self.segments[at].slots[slot] = tag(hash) | new;
        } else if let Some(crowd) = self.crowd.get_mut(&hash) {
            crowd.iter_mut().filter(|other| **other == old).for_each(|other| *other = new);
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.directory.capacity() * 4 + self.segments.len() * (SEGMENT * 4 + size_of::<Segment>() + 16)
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

    #[test]
    fn finds_what_was_inserted_and_not_what_was_removed() {
        let mut table = Table::new(fixed());
        let name = |id: RecordId| u64::from(id).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        for id in 1..=200_000 {
            table.insert(name(id), id, name);
        }
        for id in (1..=200_000).step_by(3) {
            table.remove(name(id), id);
        }
        for id in 1..=200_000 {
            let found = table.find(name(id), |other| other == id);
            assert_eq!(found, (id % 3 != 1).then_some(id));
        }
        for id in (1..=200_000).step_by(3) {
            table.insert(name(id), id, name);
        }
        assert!((1..=200_000).all(|id| table.find(name(id), |other| other == id).is_some()));
    }

    #[test]
    fn one_name_may_stand_for_more_records_than_a_segment_holds() {
        let mut table = Table::new(fixed());
        for id in 1..=5000 {
            table.insert(7, id, |_| 7);
        }
        assert!((1..=5000).all(|id| table.find(7, |other| other == id) == Some(id)));
        assert!(table.directory.len() <= 2, "names that can't be told apart must not grow the directory");
        for id in 1..=5000 {
            table.remove(7, id);
        }
        assert_eq!(table.find(7, |_| true), None);
    }

    #[test]
    fn a_record_can_take_anothers_place() {
        let mut table = Table::new(fixed());
        table.insert(1, 1, |_| 1);
        table.replace(1, 1, 2);
        assert_eq!(table.find(1, |_| true), Some(2));
    }
}
