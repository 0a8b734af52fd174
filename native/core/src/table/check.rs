//! A table walked from end to end.

use super::*;

impl Table {
    /// All records, as often as they are in here. Panics where what is maintained differs from a fresh count.
    pub fn check(&self, name_of: impl Fn(RecordId) -> u64) -> Vec<RecordId> {
        assert_eq!(self.directory.len(), 1 << self.depth);
        let mut found = Vec::new();
        for (number, segment) in self.segments.iter().enumerate() {
            let share = 1 << (self.depth - u32::from(segment.depth));
            let first = self.directory.iter().position(|other| *other as usize == number).expect("a segment is used");
            assert_eq!(first % share, 0);
            assert!(self.directory[first..first + share].iter().all(|other| *other as usize == number));
            assert_eq!(self.directory.iter().filter(|other| **other as usize == number).count(), share);
            let slots = self.slots(number);
            let used = slots.iter().filter(|slot| **slot != EMPTY).count();
            let live: Vec<RecordId> = slots.iter().map(|slot| slot & RECORD_MAX).filter(|id| *id != 0).collect();
            assert_eq!((usize::from(segment.used), usize::from(segment.live)), (used, live.len()));
            assert!(used <= usize::from(USED_MAX));
            found.extend(live);
        }
        found.extend(self.crowd.values().flatten());
        assert!(self.crowd.values().all(|crowd| !crowd.is_empty()));
        for id in &found {
            let place = Place::of(name_of(*id), self.secret);
            assert_eq!(self.find(place, |other| other == *id), Some(*id), "record {id} is not where its name falls");
        }
        found.sort_unstable();
        found
    }
}
