//! The whole state counted again, from scratch: for tests and fuzzers.

use super::*;
use crate::sets::Kind;
use crate::slots::{RETIRED, copies_in, is_held, place_of, slot_in, stream_of};
use crate::stream::Orphan;
use std::collections::{HashMap, HashSet};

impl State {
    /// Panics where what is maintained differs from a fresh count.
    pub fn check(&self) {
        let mut free: HashSet<StreamId> = self.free.iter().copied().collect();
        assert_eq!(free.len(), self.free.len());
        let mut keys = HashMap::new();
        for (id, stream) in self.streams.iter().enumerate() {
            match stream {
                None => assert!(free.remove(&(id as StreamId)), "an unused number is free"),
                Some(stream) => {
                    assert_eq!(self.by_name.get(&stream.name), Some(&(id as StreamId)));
                    assert_eq!(stream.id as usize, id);
                    stream.irregular.check(&mut keys);
                    self.check_stream(stream);
                }
            }
        }
        assert!(free.is_empty());
        assert_eq!(self.by_name.len(), self.streams().count());
        assert_eq!(self.shared.orphans, self.streams().map(|stream| stream.orphans.len()).sum::<usize>());
        assert_eq!(self.shared.irregular, self.streams().map(|stream| stream.irregular.len()).sum::<usize>());
        self.shared.blocks.check(&keys);
        self.shared.promises.check();
        self.check_order();
    }

    fn check_stream(&self, stream: &Stream) {
        let blocks = &self.shared.blocks;
        let (mut held, mut retired_by) = stream.irregular.counts();
        for id in blocks.records() {
            let set = blocks.set(id);
            let mine = blocks.sets.of_stream(set, stream.id);
            mine.iter().filter(|item| is_held(**item)).for_each(|item| _ = stream.place(slot_in(*item)));
            if blocks.sets.kind(set) == Kind::Key || mine.is_empty() {
                continue;
            }
            let hash = blocks.hash(id);
            assert!(stream.irregular.get(hash).is_none() && !stream.orphans.contains_key(&hash), "a hash is known in one way");
            match *mine {
                [only] if !is_held(only) => {
                    assert_eq!(copies_in(only), 1);
                    retired_by[place_of(slot_in(only)) as usize] += 1;
                }
                _ => held += 1,
            }
        }
        let waiting = |orphan: &Orphan| orphan.tokens.is_some();
        let mut resident = 0;
        for (hash, orphan) in &stream.orphans {
            assert!(stream.irregular.get(*hash).is_none(), "a hash is known in one way");
            assert!(waiting(orphan) || !orphan.copies.is_empty(), "an orphan that nothing is known of");
            assert!(!waiting(orphan) || orphan.parent.is_none_or(|parent| stream.children[&parent].contains(hash)));
            resident += u64::from(!orphan.copies.is_empty());
            orphan.copies.iter().for_each(|(slot, copies)| assert!(*copies > 0 && place_of(*slot) >= RETIRED));
        }
        assert_eq!(stream.held, held + resident, "blocks held by {:?}", stream.name);
        assert_eq!(stream.retired, retired_by, "blocks remembered by {:?}", stream.name);
        assert_eq!(stream.orphans_resident, resident, "orphans held by {:?}", stream.name);
        assert!(stream.irregular.slots().all(|slot| stream_of(slot) == stream.id));
        for (parent, children) in &stream.children {
            assert!(!children.is_empty());
            for child in children {
                let orphan = stream.orphans.get(child).expect("only orphans wait");
                assert!(waiting(orphan) && orphan.parent == Some(*parent), "a child waits for its parent");
            }
            assert_eq!(children.iter().collect::<HashSet<_>>().len(), children.len(), "a child waits once");
        }
    }

    /// The one that goes next is the least recently used one; no key is older than is known.
    fn check_order(&self) {
        let blocks = &self.shared.blocks;
        for id in blocks.records() {
            blocks.sets.items(blocks.set(id)).iter().for_each(|item| _ = self.stream(stream_of(slot_in(*item))));
        }
        let held = blocks.records().filter(|id| blocks.is_held_primary(*id));
        let oldest = held.map(|id| (blocks.stamp_of(id), id)).min();
        assert!(oldest.is_none_or(|(stamp, _)| stamp >= self.not_before && stamp <= self.shared.recency.now()));
        if let Some(next) = self.victims.peek(blocks) {
            assert_eq!(Some(next), oldest.map(|(_, id)| id), "the next victim is the least recently used key");
        }
    }
}
