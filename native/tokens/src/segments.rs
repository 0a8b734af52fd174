//! What is known: the tokens of text between two cuts, within a bound of memory.

use crate::seams::Edge;
use ahash::RandomState;
use hashbrown::HashTable;
use parking_lot::RwLock;
use smallvec::SmallVec;
use std::hash::{BuildHasher, Hasher};

/// A text between two cuts, and all else that its tokens depend on.
#[derive(Clone, Copy)]
pub struct Segment<'t> {
    pub text: &'t [u8],
    side: u64,
}

impl<'t> Segment<'t> {
    /// `space`: whose tokens these are. `last`: the text ends with this segment.
    pub fn new(text: &'t [u8], space: u32, left: Edge, last: bool) -> Self {
        let left = match left {
            Edge::Start => 0,
            Edge::Text => 1,
            Edge::Special(_) => 2,
        };
        Self { text, side: u64::from(space) << 3 | left << 1 | u64::from(last) }
    }
}

struct Entry {
    side: u64,
    text: SmallVec<[u8; 16]>,
    tokens: SmallVec<[u32; 4]>,
}

/// What an entry costs in a table that is half full, without what does not fit into it.
const ENTRY_BYTES: usize = 2 * size_of::<Entry>();
/// A segment that costs more than this share of the memory is not kept.
const SHARE_MAX: usize = 16;

impl Entry {
    fn is(&self, segment: &Segment<'_>) -> bool {
        self.side == segment.side && *self.text == *segment.text
    }

    fn bytes(&self) -> usize {
        let text = if self.text.spilled() { self.text.capacity() } else { 0 };
        let tokens = if self.tokens.spilled() { 4 * self.tokens.capacity() } else { 0 };
        ENTRY_BYTES + text + tokens
    }
}

#[derive(Default)]
struct Generation {
    entries: HashTable<Entry>,
    held: SegmentsHeld,
}

/// What was used since the last change of generations, and what was used in the one before.
#[derive(Default)]
struct Generations {
    young: Generation,
    old: Generation,
    evicted: usize,
}

/// The tokens that are known of a text's segments.
#[derive(Default)]
pub struct Known {
    /// Of all known segments, one after the other.
    pub tokens: Vec<u32>,
    /// Of each segment: where its tokens begin in `tokens` and where they end; None for one that is not known.
    pub spans: Vec<Option<(usize, usize)>>,
}

/// What is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentsHeld {
    /// Segments.
    pub entries: usize,
    /// Bytes of their text.
    pub text_bytes: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Estimated memory.
    pub bytes: usize,
    /// Segments that went, since the beginning.
    pub evicted: usize,
}

impl SegmentsHeld {
    fn plus(&mut self, entry: &Entry) {
        self.entries += 1;
        self.text_bytes += entry.text.len();
        self.tokens += entry.tokens.len();
        self.bytes += entry.bytes();
    }

    fn minus(&mut self, entry: &Entry) {
        self.entries -= 1;
        self.text_bytes -= entry.text.len();
        self.tokens -= entry.tokens.len();
        self.bytes -= entry.bytes();
    }
}

/// Two tokens were told for one segment.
#[derive(Debug)]
pub struct Contradiction;

/// Segments of any number of tokenizers. What was not used for one or two generations goes; a generation ends when it has half
/// of the memory. Looking up writes nothing, so that threads don't wait for each other.
pub struct Segments {
    hashes: RandomState,
    generation_bytes_max: usize,
    held: RwLock<Generations>,
}

impl Segments {
    /// With a bound of memory.
    pub fn new(bytes_max: usize) -> Self {
        Self { hashes: RandomState::new(), generation_bytes_max: bytes_max / 2, held: RwLock::default() }
    }

    /// What is held now.
    pub fn held(&self) -> SegmentsHeld {
        let held = self.held.read();
        let (young, old) = (held.young.held, held.old.held);
        SegmentsHeld {
            entries: young.entries + old.entries,
            text_bytes: young.text_bytes + old.text_bytes,
            tokens: young.tokens + old.tokens,
            bytes: young.bytes + old.bytes,
            evicted: held.evicted,
        }
    }

    /// What is known of segments. It counts as used.
    pub fn find<'t>(&self, segments: impl Iterator<Item = Segment<'t>> + Clone) -> Known {
        let mut known = Known::default();
        let mut old = Vec::new();
        let held = self.held.read();
        for segment in segments {
            let hash = self.hash(segment.side, segment.text);
            let mut entry = held.young.entries.find(hash, |entry| entry.is(&segment));
            if entry.is_none() {
                entry = held.old.entries.find(hash, |entry| entry.is(&segment));
                old.extend(entry.map(|_| (hash, segment)));
            }
            let begin = known.tokens.len();
            known.spans.push(entry.map(|entry| {
                known.tokens.extend_from_slice(&entry.tokens);
                (begin, known.tokens.len())
            }));
        }
        drop(held);
        if !old.is_empty() {
            self.use_again(&old);
        }
        known
    }

    /// Remember segments' tokens. Contradiction, and nothing more is remembered, where others are known of one of them.
    pub fn add<'t, 's>(&self, segments: impl Iterator<Item = (Segment<'t>, &'s [u32])>) -> Result<(), Contradiction> {
        let mut gone = Vec::new(); // let go of without the lock: that takes a while
        let mut held = self.held.write();
        for (segment, tokens) in segments {
            let hash = self.hash(segment.side, segment.text);
            match held.find(hash, &segment) {
                Some(entry) if *entry.tokens == *tokens => {}
                Some(_) => return Err(Contradiction),
                None => {
                    let entry = Entry { side: segment.side, text: segment.text.into(), tokens: tokens.into() };
                    if entry.bytes() <= self.generation_bytes_max / SHARE_MAX {
                        gone.extend(self.put(&mut held, hash, entry));
                    }
                }
            }
        }
        drop(held);
        Ok(())
    }

    /// Take segments over from the old generation.
    fn use_again(&self, old: &[(u64, Segment<'_>)]) {
        let mut gone = Vec::new();
        let mut held = self.held.write();
        for (hash, segment) in old {
            let Ok(found) = held.old.entries.find_entry(*hash, |entry| entry.is(segment)) else { continue };
            let (entry, _) = found.remove();
            held.old.held.minus(&entry);
            gone.extend(self.put(&mut held, *hash, entry));
        }
        drop(held);
    }

    /// Add an entry to the young generation; return the old one, if this was the young one's last.
    fn put(&self, held: &mut Generations, hash: u64, entry: Entry) -> Option<Generation> {
        held.young.held.plus(&entry);
        held.young.entries.insert_unique(hash, entry, |entry| self.hash(entry.side, &entry.text));
        if held.young.held.bytes <= self.generation_bytes_max {
            return None;
        }
        held.evicted += held.old.held.entries;
        let young = std::mem::take(&mut held.young);
        Some(std::mem::replace(&mut held.old, young))
    }

    /// Keyed: nobody can choose texts that fall together.
    fn hash(&self, side: u64, text: &[u8]) -> u64 {
        let mut hasher = self.hashes.build_hasher();
        hasher.write_u64(side);
        hasher.write(text);
        hasher.finish()
    }
}

impl Generations {
    fn find(&self, hash: u64, segment: &Segment<'_>) -> Option<&Entry> {
        let is = |entry: &Entry| entry.is(segment);
        self.young.entries.find(hash, is).or_else(|| self.old.entries.find(hash, is))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(text: &str) -> Segment<'_> {
        Segment::new(text.as_bytes(), 0, Edge::Text, false)
    }

    fn tokens(segments: &Segments, text: &str) -> Option<Vec<u32>> {
        let known = segments.find([segment(text)].into_iter());
        known.spans[0].map(|_| known.tokens)
    }

    #[test]
    fn a_segment_is_known_in_its_space_and_between_its_edges_only() {
        let segments = Segments::new(1 << 20);
        segments.add([(segment(" word"), &[1, 2][..])].into_iter()).unwrap();
        assert_eq!(tokens(&segments, " word"), Some(vec![1, 2]));
        let others = [
            Segment::new(b" word", 1, Edge::Text, false),
            Segment::new(b" word", 0, Edge::Start, false),
            Segment::new(b" word", 0, Edge::Special(7), false),
            Segment::new(b" word", 0, Edge::Text, true),
            segment(" words"),
        ];
        assert_eq!(segments.find(others.into_iter()).spans, [None; 5]);
    }

    #[test]
    fn other_tokens_of_a_known_segment_are_a_contradiction() {
        let segments = Segments::new(1 << 20);
        segments.add([(segment(" word"), &[1][..])].into_iter()).unwrap();
        segments.add([(segment(" word"), &[1][..])].into_iter()).unwrap();
        segments.add([(segment(" word"), &[2][..])].into_iter()).unwrap_err();
        assert_eq!(segments.held().entries, 1);
    }

    #[test]
    fn memory_is_bounded_and_what_is_used_stays() {
        let bytes_max = 100 * ENTRY_BYTES;
        let segments = Segments::new(bytes_max);
        for number in 0..1_000_u32 {
            let text = format!(" w{number}");
            segments.add([(segment(&text), &[number][..])].into_iter()).unwrap();
            assert!(segments.held().bytes <= bytes_max + ENTRY_BYTES);
            assert_eq!(tokens(&segments, " w0"), Some(vec![0]));
        }
        assert_eq!(tokens(&segments, " w1"), None);
        let held = segments.held();
        assert_eq!(held.entries + held.evicted, 1_000);
    }

    #[test]
    fn a_large_segment_is_not_kept() {
        let segments = Segments::new(1 << 16);
        let text = "x".repeat(1 << 12);
        segments.add([(segment(&text), &[1][..])].into_iter()).unwrap();
        assert_eq!(segments.held(), SegmentsHeld::default());
    }
}
