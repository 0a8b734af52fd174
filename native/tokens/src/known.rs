//! A text's tokens, of which only those of segments that were never seen are made anew; and never a wrong one comes of it.
//!
//! A text is cut at its seams. By their proof, the tokens between two of them depend on what lies between and on nothing else but
//! whether a text or a section begins or ends there. What is unknown is made from the text around it: from one seam earlier than
//! what is compared, since a text's start may change tokens there, to as far behind its end as the seam has to be seen.

use crate::encoder::{Encoder, Failure};
use crate::seams::{Cut, Seams};
use crate::segments::{Known, Segment, Segments};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

/// Unknown segments with fewer known ones than this between them are made in one go: each go has a price of its own.
const BETWEEN_MAX: usize = 8;

static SPACES: AtomicU32 = AtomicU32::new(0);

/// A text's tokens.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// All of them.
    pub ids: Vec<u32>,
    /// How many of them were known.
    pub known: usize,
    /// Says, with the one text where that was found, why nothing known is used from here on.
    pub off: Option<&'static str>,
}

/// What was done, counted since the beginning; as `kvatlas.tokens.incremental.EncoderStats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Texts made in full: nothing of them was known, or they could not be cut.
    pub full: u64,
    /// Texts of which something was known.
    pub assisted: u64,
    /// Tokens that were known.
    pub tokens_known: u64,
    /// Texts whose tokens did not fit together at a seam; made in full.
    pub mismatches: u64,
    /// Texts made in full as well, to compare.
    pub audits: u64,
    /// Comparisons that failed.
    pub audit_failures: u64,
}

#[derive(Default)]
struct Counters {
    full: AtomicU64,
    assisted: AtomicU64,
    tokens_known: AtomicU64,
    mismatches: AtomicU64,
    audits: AtomicU64,
    audit_failures: AtomicU64,
}

/// A tokenizer that remembers segments of texts. Any number of threads may use it.
pub struct KnownText {
    encoder: Arc<Encoder>,
    seams: Seams,
    segments: Arc<Segments>,
    space: u32,
    audit_every: u64,
    counters: Counters,
    off: OnceLock<&'static str>,
}

/// What can't be had of the known.
enum Trouble {
    /// No token ends at a cut, or those around it are others.
    Unfit,
    /// It was proven, and is not so.
    Wrong(&'static str),
    Failed(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl KnownText {
    /// The first text with something known is audited, and then one in `audit_every`.
    pub fn new(encoder: Arc<Encoder>, seams: Seams, segments: Arc<Segments>, audit_every: u64) -> Self {
        let space = SPACES.fetch_add(1, Relaxed);
        let counters = Counters::default();
        Self { encoder, seams, segments, space, audit_every: audit_every.max(1), counters, off: OnceLock::new() }
    }

    /// What was done until now.
    pub fn stats(&self) -> Stats {
        let Counters { full, assisted, tokens_known, mismatches, audits, audit_failures } = &self.counters;
        Stats {
            full: full.load(Relaxed),
            assisted: assisted.load(Relaxed),
            tokens_known: tokens_known.load(Relaxed),
            mismatches: mismatches.load(Relaxed),
            audits: audits.load(Relaxed),
            audit_failures: audit_failures.load(Relaxed),
        }
    }

    /// Why nothing known is used any more; None while it is.
    pub fn off(&self) -> Option<&'static str> {
        self.off.get().copied()
    }

    /// A text's tokens.
    pub fn tokens(&self, text: &str) -> Result<Found, Failure> {
        if self.off().is_some() {
            return self.full(text, None);
        }
        match self.assisted(text) {
            Ok((ids, 0)) => {
                self.counters.full.fetch_add(1, Relaxed);
                Ok(Found { ids, known: 0, off: None })
            }
            Ok((ids, known)) => self.audited(text, ids, known),
            Err(Trouble::Failed(failure)) => Err(failure),
            Err(Trouble::Unfit) => {
                self.counters.mismatches.fetch_add(1, Relaxed);
                self.full(text, None)
            }
            Err(Trouble::Wrong(reason)) => {
                self.counters.mismatches.fetch_add(1, Relaxed);
                self.full(text, Some(reason))
            }
        }
    }

    /// The known ones of a text's first tokens: those of every text that begins so. Makes none.
    pub fn prefix(&self, text: &str) -> Vec<u32> {
        if self.off().is_some() {
            return Vec::new();
        }
        let cuts = self.seams.cuts(text);
        let mut known = self.segments.find((0..cuts.len() - 1).map(|at| self.segment(text, &cuts, at)));
        let count = known.spans.iter().map_while(|span| *span).last().map_or(0, |span| span.1);
        known.tokens.truncate(count);
        known.tokens
    }

    fn full(&self, text: &str, off: Option<&'static str>) -> Result<Found, Failure> {
        self.counters.full.fetch_add(1, Relaxed);
        let off = off.filter(|reason| self.off.set(reason).is_ok());
        Ok(Found { ids: self.encoder.ids(text)?, known: 0, off })
    }

    fn audited(&self, text: &str, ids: Vec<u32>, known: usize) -> Result<Found, Failure> {
        if self.counters.assisted.load(Relaxed).is_multiple_of(self.audit_every) {
            self.counters.audits.fetch_add(1, Relaxed);
            if self.encoder.ids(text)? != ids {
                self.counters.audit_failures.fetch_add(1, Relaxed);
                return self.full(text, Some("an audit failed: known tokens differed from those of the whole text"));
            }
        }
        self.counters.assisted.fetch_add(1, Relaxed);
        self.counters.tokens_known.fetch_add(known as u64, Relaxed);
        Ok(Found { ids, known, off: None })
    }

    /// A text's tokens, and how many of them were known.
    fn assisted(&self, text: &str) -> Result<(Vec<u32>, usize), Trouble> {
        let cuts = self.seams.cuts(text);
        let known = self.segments.find((0..cuts.len()).map(|at| self.segment(text, &cuts, at)));
        let runs = unknown_runs(&known);
        if runs.is_empty() {
            let count = known.tokens.len();
            return Ok((known.tokens, count));
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut count = 0;
        let mut done = 0;
        for run in runs {
            let before = known.between(done..run.start);
            ids.extend_from_slice(before);
            count += before.len();
            ids.extend_from_slice(&self.make(text, &cuts, &run, &known)?);
            done = run.end;
        }
        let rest = known.between(done..cuts.len());
        ids.extend_from_slice(rest);
        Ok((ids, count + rest.len()))
    }

    /// Make the tokens of a run of segments, compare those before it, and remember each segment's.
    fn make(&self, text: &str, cuts: &[Cut], run: &Range<usize>, known: &Known) -> Result<Vec<u32>, Trouble> {
        let start = cuts[run.start.saturating_sub(2)].at;
        let end = cuts.get(run.end).map_or(text.len(), |cut| cut.at + cut.ahead);
        let made = self.encoder.encode(&text[start..end])?;
        let places: Option<Vec<usize>> = (run.start..=run.end)
            .map(|at| cuts.get(at).map_or(Some(made.ids.len()), |cut| cut.tokens_before(&made, start)))
            .collect();
        let places = places.ok_or(Trouble::Unfit)?;
        if run.start > 0 {
            let from = cuts[run.start - 1].tokens_before(&made, start).ok_or(Trouble::Unfit)?;
            if made.ids[from..places[0]] != *known.between(run.start - 1..run.start) {
                return Err(Trouble::Wrong("tokens before a seam differed from those that were known"));
            }
        }
        let segments = run.clone().zip(places.windows(2));
        self.segments
            .add(segments.map(|(at, ends)| (self.segment(text, cuts, at), &made.ids[ends[0]..ends[1]])))
            .map_err(|_| Trouble::Wrong("the same text between seams had other tokens elsewhere"))?;
        Ok(made.ids[places[0]..places[places.len() - 1]].to_vec())
    }

    fn segment<'t>(&self, text: &'t str, cuts: &[Cut], at: usize) -> Segment<'t> {
        let end = cuts.get(at + 1).map_or(text.len(), |cut| cut.at);
        Segment::new(&text.as_bytes()[cuts[at].at..end], self.space, cuts[at].edge, at + 1 == cuts.len())
    }
}

impl Known {
    /// The tokens of known segments that follow each other.
    fn between(&self, segments: Range<usize>) -> &[u32] {
        let mut spans = self.spans[segments].iter().flatten();
        let Some(first) = spans.next() else { return &[] };
        &self.tokens[first.0..spans.next_back().unwrap_or(first).1]
    }
}

/// Unknown segments, in runs; with the few known ones between them.
fn unknown_runs(known: &Known) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, span) in known.spans.iter().enumerate() {
        if span.is_some() {
            continue;
        }
        match runs.last_mut() {
            Some(run) if at <= run.end + BETWEEN_MAX => run.end = at + 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}
