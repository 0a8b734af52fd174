//! What happened. As `kvatlas.sim.engines.Happening`.

use std::ops::Range;

/// What it was, in the order of `kvatlas.sim.engines.Kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    Scheduled,
    FirstToken,
    Finished,
    Preempted,
    Stored,
    Removed,
    Refused,
    Published,
}

/// How it is told what steps did to caches, in the order of `kvatlas.sim.engines.Events`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Events {
    #[default]
    Nothing,
    Each,
    Frames,
}

/// One of them.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Happening {
    pub at_s: f64,
    pub kind: Kind,
    pub engine: usize,
    pub job: i64,
    pub first: u64,
    pub many: u64,
    pub tier: usize,
    /// Where its keys are in [`Told::keys`].
    pub keys: Range<usize>,
    /// What was published.
    pub payload: Vec<u8>,
}

/// All that happened since somebody took it.
#[derive(Default)]
pub struct Told {
    /// In the order of time, once a run has ended.
    pub happenings: Vec<Happening>,
    /// Keys that were removed.
    pub keys: Vec<u64>,
    pub(crate) events: Events,
}

impl Told {
    /// Something about a job.
    pub(crate) fn job(&mut self, at_s: f64, kind: Kind, engine: usize, job: i64, first: u64, many: u64) {
        self.happenings.push(Happening { first, many, ..Happening::of(at_s, kind, engine, job) });
    }

    /// Blocks of a job are in a tier.
    pub(crate) fn stored(&mut self, at_s: f64, engine: usize, job: i64, blocks: Range<usize>, tier: usize) {
        let (first, many) = (blocks.start as u64, blocks.len() as u64);
        self.happenings.push(Happening { first, many, tier, ..Happening::of(at_s, Kind::Stored, engine, job) });
    }

    /// Keys are not in a tier any more.
    pub(crate) fn removed(&mut self, at_s: f64, engine: usize, keys: &[u64], tier: usize) {
        let begin = self.keys.len();
        self.keys.extend_from_slice(keys);
        let keys = begin..self.keys.len();
        self.happenings.push(Happening { tier, keys, ..Happening::of(at_s, Kind::Removed, engine, 0) });
    }

    /// An engine published what it did to its cache.
    pub(crate) fn published(&mut self, at_s: f64, engine: usize, payload: Vec<u8>) {
        self.happenings.push(Happening { payload, ..Happening::of(at_s, Kind::Published, engine, 0) });
    }

    /// Put it in the order of time, and of engines at one time.
    pub(crate) fn sort(&mut self) {
        let place = |happening: &Happening| (happening.at_s.to_bits(), happening.engine);
        if !self.happenings.is_sorted_by_key(place) {
            self.happenings.sort_by_key(place); // times are not negative: their bits are in their order
        }
    }
}

impl Happening {
    fn of(at_s: f64, kind: Kind, engine: usize, job: i64) -> Self {
        Self { at_s, kind, engine, job, first: 0, many: 0, tier: 0, keys: 0..0, payload: Vec::new() }
    }
}
