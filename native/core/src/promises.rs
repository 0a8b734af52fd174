//! Speculative entries: blocks that a stream was promised, because a request for them was sent there. As `kvatlas.index.promises`.

use crate::keys::BlockKey;
use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use smallvec::SmallVec;
use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

#[cfg(any(test, fuzzing))]
mod check;

/// A stream by name: it may have been promised blocks before anything was heard of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamName {
    /// The pod's name, in UTF-8.
    pub pod: Box<str>,
    /// The data-parallel rank.
    pub dp_rank: u32,
}

/// When a promise ends, in seconds.
#[derive(Clone, Copy, Debug)]
struct End(f64);

impl PartialEq for End {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for End {}

impl PartialOrd for End {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for End {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Promises with the same end, the one that ends first on top. Those of a prompt are made together: so they lie together, too.
type Due = BinaryHeap<Reverse<(BlockKey, Arc<StreamName>)>>;

/// Who was promised a block, and until when.
type Promised = SmallVec<[(Arc<StreamName>, f64); 1]>;

/// All promises. Each ends by its event or by its time; the one that ends first is given up for one too many.
pub struct Promises {
    records_max: usize,
    ends_s: HashMap<BlockKey, Promised>,
    /// By end; a promise that was renewed or kept stays in here until its first end.
    queue: BTreeMap<End, Due>,
    records: usize,
    count: usize,
}

impl Promises {
    /// None.
    pub fn new(records_max: usize) -> Self {
        Self { records_max, ends_s: HashMap::new(), queue: BTreeMap::new(), records: 0, count: 0 }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many records are held, for accounting.
    pub fn records(&self) -> usize {
        self.records
    }

    /// When the next record ends.
    pub fn next_end_s(&self) -> f64 {
        self.queue.first_key_value().map_or(f64::INFINITY, |(end, _)| end.0)
    }

    /// The streams that were promised a block for longer than until now.
    #[inline]
    pub fn of(&self, key: BlockKey, now_s: f64) -> impl Iterator<Item = &Arc<StreamName>> {
        self.ends_s.get(&key).into_iter().flatten().filter(move |(_, end_s)| *end_s > now_s).map(|(stream, _)| stream)
    }

    /// Promise a block.
    pub fn make(&mut self, key: BlockKey, stream: &Arc<StreamName>, end_s: f64) {
        let streams = self.ends_s.entry(key).or_default();
        if let Some(known) = streams.iter_mut().find(|(other, _)| other == stream) {
            known.1 = end_s;
        } else {
            streams.push((stream.clone(), end_s));
            self.count += 1;
        }
        self.queue.entry(End(end_s)).or_default().push(Reverse((key, stream.clone())));
        self.records += 1;
        while self.records > self.records_max {
            self.give_up_next();
        }
    }

    /// The block has come (or its time is up): the promise is no more.
    #[inline]
    pub fn keep(&mut self, key: BlockKey, stream: &StreamName) {
        if self.count == 0 {
            return;
        }
        let Some(streams) = self.ends_s.get_mut(&key) else { return };
        let before = streams.len();
        streams.retain(|(other, _)| **other != *stream);
        self.count -= before - streams.len();
        if streams.is_empty() {
            self.ends_s.remove(&key);
        }
    }

    /// End those whose time is up.
    pub fn expire(&mut self, now_s: f64) {
        while self.next_end_s() <= now_s {
            self.give_up_next();
        }
    }

    /// End the promise that would end next. False if there is none.
    pub fn give_up_next(&mut self) -> bool {
        let Some(mut due) = self.queue.first_entry() else { return false };
        let end = *due.key();
        let next = due.get_mut().pop();
        if due.get().is_empty() {
            due.remove();
        }
        let Some(Reverse((key, promised))) = next else { return false };
        self.records -= 1;
        if let Entry::Occupied(mut streams) = self.ends_s.entry(key) {
            let before = streams.get().len();
            streams.get_mut().retain(|(stream, end_s)| *stream != promised || *end_s != end.0);
            self.count -= before - streams.get().len();
            if streams.get().is_empty() {
                streams.remove();
            }
        }
        true
    }
}
