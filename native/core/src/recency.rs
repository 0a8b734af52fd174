//! Which blocks were used when: an exact order of use, and its time, without a list to keep in order.
//!
//! Every use gets the next *tick* as the record's stamp: a store that readers do too, without a lock. Whoever evicts sorts the
//! oldest stamps once for many evictions; a stamp that has changed since is no longer the oldest. Times are kept for ranges of
//! ticks.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A point in the order of use.
pub type Tick = u64;

/// The time to live is told apart in so many steps.
const STEPS: f64 = 4096.0;

struct Epochs {
    /// (ticks after this one, are not before this time), oldest first.
    began: VecDeque<(Tick, f64)>,
}

/// The clock of uses.
pub struct Recency {
    ttl_s: f64,
    last: AtomicU64,
    /// The last epoch's time as bits: whether another has begun is known without the lock.
    epoch_s: AtomicU64,
    /// The first epoch's beginning and the last tick before it: whether it has expired is known without the lock.
    first: (AtomicU64, AtomicU64),
    epochs: Mutex<Epochs>,
}

impl Recency {
    /// Nothing was used yet.
    pub fn new(ttl_s: f64) -> Self {
        let epochs = Mutex::new(Epochs { began: VecDeque::new() });
        Self {
            ttl_s,
            last: AtomicU64::new(0),
            epoch_s: AtomicU64::new(f64::NEG_INFINITY.to_bits()),
            first: (AtomicU64::new(f64::INFINITY.to_bits()), AtomicU64::new(0)),
            epochs,
        }
    }

    /// Take the ticks of `count` uses at a time. Returns the tick before the first.
    #[inline]
    pub fn take(&self, count: u64, now_s: f64) -> Tick {
        let epoch_s = f64::from_bits(self.epoch_s.load(Relaxed));
        if now_s > epoch_s && (epoch_s == f64::NEG_INFINITY || now_s - epoch_s >= self.ttl_s / STEPS) {
            let mut epochs = self.epochs.lock();
            epochs.began.push_back((self.last.load(Relaxed), now_s));
            self.note_first(&epochs);
            self.epoch_s.store(now_s.to_bits(), Relaxed);
        }
        self.last.fetch_add(count, Relaxed)
    }

    /// The last tick taken.
    pub fn now(&self) -> Tick {
        self.last.load(Relaxed)
    }

    /// The last tick whose use is as old as the time to live; 0 if none is.
    pub fn expired(&self, now_s: f64) -> Tick {
        if now_s - f64::from_bits(self.first.0.load(Relaxed)) < self.ttl_s {
            return self.first.1.load(Relaxed);
        }
        let mut epochs = self.epochs.lock();
        while epochs.began.len() > 1 && now_s - epochs.began[1].1 >= self.ttl_s {
            epochs.began.pop_front();
        }
        self.note_first(&epochs);
        match (epochs.began.front(), epochs.began.get(1)) {
            (Some((_, began_s)), next) if now_s - began_s >= self.ttl_s => next.map_or(self.now(), |(tick, _)| *tick),
            (Some((tick, _)), _) => *tick,
            (None, _) => 0,
        }
    }

    fn note_first(&self, epochs: &Epochs) {
        if let Some((tick, began_s)) = epochs.began.front() {
            self.first.1.store(*tick, Relaxed);
            self.first.0.store(began_s.to_bits(), Relaxed);
        }
    }

    /// The last tick, and since when (in seconds of age) uses have ticks after some earlier ones: for a snapshot.
    pub fn ages_s(&self, now_s: f64) -> (Tick, Vec<(Tick, f64)>) {
        let epochs = self.epochs.lock();
        let mut least_s = f64::INFINITY; // two uses at nearly the same time may have begun epochs out of order
        let ages_s = epochs.began.iter().map(|(tick, began_s)| {
            least_s = least_s.min(now_s - began_s).max(0.0);
            (*tick, least_s)
        });
        (self.now(), ages_s.collect())
    }

    /// Go on from what [`Recency::ages_s`] told. For a fresh clock only.
    pub fn restore(&self, ages_s: &[(Tick, f64)], last: Tick, now_s: f64) {
        let mut epochs = self.epochs.lock();
        epochs.began = ages_s.iter().map(|(tick, age_s)| (*tick, now_s - age_s)).collect();
        self.epoch_s.store(epochs.began.back().map_or(f64::NEG_INFINITY, |(_, began_s)| *began_s).to_bits(), Relaxed);
        self.last.store(last, Relaxed);
        self.note_first(&epochs);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_expire_with_their_time() {
        let recency = Recency::new(100.0);
        assert_eq!(recency.expired(1e9), 0);
        assert_eq!(recency.take(5, 0.0), 0);
        assert_eq!(recency.take(5, 60.0), 5);
        assert_eq!(recency.expired(99.0), 0);
        assert_eq!(recency.expired(100.0), 5);
        assert_eq!(recency.expired(159.0), 5);
        assert_eq!(recency.expired(160.0), 10);
        recency.take(1, 170.0);
        assert_eq!(recency.expired(180.0), 10);
        assert_eq!(recency.ages_s(180.0), (11, vec![(5, 120.0), (10, 10.0)]));
        let restored = Recency::new(100.0);
        restored.restore(&[(5, 120.0), (10, 10.0)], 11, 1000.0);
        assert_eq!(restored.expired(1089.0), 10);
        assert_eq!(restored.expired(1090.0), 11);
        assert_eq!(restored.take(1, 1090.0), 11);
    }
}
