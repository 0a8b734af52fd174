//! Records counted again.

use super::*;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Copies by slot.
pub type Copies = BTreeMap<crate::slots::Slot, u64>;

impl Blocks {
    /// Panics where what is maintained differs from a fresh count. `elsewhere`: copies of keys that irregular blocks make up.
    pub fn check(&self, elsewhere: &HashMap<BlockKey, Copies>) {
        let mut named = vec![0; self.sets.numbers() as usize];
        let (mut by_key, mut by_hash, mut keys, mut known) = (Vec::new(), Vec::new(), HashSet::new(), HashSet::new());
        let (mut entries, mut held, mut names, mut listed) = (0, 0, 0, 0);
        for id in self.records() {
            named[*self.sets_of.at(id) as usize] += 1;
            let set = self.set(id);
            let kind = self.sets.kind(set);
            if kind == Kind::Name {
                names += 1;
            } else {
                by_key.push(id);
                assert!(keys.insert(*self.keys.at(id)), "two records of one key");
                entries += self.sets.held(set) as usize;
                held += usize::from(self.sets.held(set) > 0);
            }
            if kind != Kind::Key {
                by_hash.push(id);
                let streams: HashSet<StreamId> =
                    self.sets.items(set).iter().map(|item| crate::slots::stream_of(slot_in(*item))).collect();
                for stream in streams {
                    assert!(known.insert((stream, *self.hashes.at(id))), "a stream knows a hash by two records");
                }
            }
            match kind {
                Kind::Block => assert!(!elsewhere.contains_key(self.keys.at(id)), "copies elsewhere want a Key"),
                Kind::Key => listed += self.check_key(id, set, elsewhere),
                Kind::Name => {}
            }
        }
        assert_eq!((entries, held), (self.entries, self.held), "entries, held");
        assert_eq!(names, listed, "Names, and those that a Key lists");
        // where record numbers have run out, copies of irregular blocks were not taken
        let ran_out = self.numbers > NUMBERS_MAX;
        assert!(ran_out || elsewhere.keys().all(|key| keys.contains(key)), "a key that irregular blocks make up has no record");
        self.sets.check(&named);
        assert_eq!(self.by_key.check(|id| *self.keys.at(id)), by_key, "records by key");
        assert_eq!(self.by_hash.check(|id| *self.hashes.at(id)), by_hash, "records by hash");
        self.check_free();
    }

    /// All records in use, dead ones included.
    pub fn records(&self) -> impl Iterator<Item = RecordId> {
        (1..self.numbers).filter(|id| *self.sets_of.at(*id) != FREE)
    }

    /// A Key sums up its Names and what lies elsewhere. Returns how many Names it has.
    fn check_key(&self, id: RecordId, set: SetId, elsewhere: &HashMap<BlockKey, Copies>) -> usize {
        let mut sum = elsewhere.get(self.keys.at(id)).cloned().unwrap_or_default();
        let names: Vec<RecordId> = self.names(id).take(self.numbers as usize).collect();
        let mut before = 0;
        for name in &names {
            assert_eq!(self.stamps.at(*name).load(Relaxed) >> 32, before, "a Name knows the one before it");
            before = u64::from(*name);
            let set = self.set(*name);
            assert_eq!((self.sets.kind(set), *self.keys.at(*name)), (Kind::Name, u64::from(id)), "a Key lists its Names");
            for item in self.sets.items(set).iter().filter(|item| is_held(**item)) {
                *sum.entry(slot_in(*item)).or_default() += u64::from(copies_in(*item));
            }
        }
        let items = self.sets.items(set).iter().map(|item| (slot_in(*item), u64::from(copies_in(*item))));
        let ran_out = self.numbers > NUMBERS_MAX;
        assert!(ran_out || items.collect::<Copies>() == sum, "a Key's copies, and those of its parts");
        assert!(!names.is_empty() || !sum.is_empty(), "a Key that nothing is left of");
        names.len()
    }

    fn check_free(&self) {
        let mut free = HashSet::new();
        let mut next = self.first_free;
        while next != 0 {
            assert_eq!(*self.sets_of.at(next), FREE);
            assert!(free.insert(next), "the free list is a circle");
            next = *self.hashes.at(next) as RecordId;
        }
        assert_eq!(free.len() + self.allocated, self.numbers as usize - 1, "records free and in use");
        assert_eq!(self.records().count(), self.allocated);
    }
}
