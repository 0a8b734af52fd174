//! Promises counted again.

use super::*;

impl Promises {
    /// Panics where what is maintained differs from a fresh count.
    pub fn check(&self) {
        assert_eq!(self.count, self.ends_s.values().map(SmallVec::len).sum::<usize>());
        assert!(self.records <= self.records_max);
        assert_eq!(self.records, self.queue.values().map(BinaryHeap::len).sum::<usize>());
        assert!(self.queue.values().all(|due| !due.is_empty()));
        for (key, streams) in &self.ends_s {
            assert!(!streams.is_empty());
            for (stream, end_s) in streams {
                let is_this = |due: &Reverse<(BlockKey, Arc<StreamName>)>| due.0.0 == *key && due.0.1 == *stream;
                let ends = self.queue.get(&End(*end_s)).is_some_and(|due| due.iter().any(is_this));
                assert!(ends, "a promise ends by its time");
            }
        }
    }
}
