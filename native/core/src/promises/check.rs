//! Promises counted again.

use super::*;

impl Promises {
    /// Panics where what is maintained differs from a fresh count.
    pub fn check(&self) {
        assert_eq!(self.count, self.ends_s.values().map(SmallVec::len).sum::<usize>());
        assert!(self.queue.len() <= self.records_max);
        for (key, streams) in &self.ends_s {
            assert!(!streams.is_empty());
            for (stream, end_s) in streams {
                let ends = |due: &Due| due.key == *key && due.stream == *stream && due.end_s == *end_s;
                assert!(self.queue.iter().any(ends), "a promise ends by its time");
            }
        }
    }
}
