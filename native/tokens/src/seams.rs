//! Where a text may be cut, by what `kvatlas.tokens.seams` has proven of its tokenizer.

use crate::encoder::Encoding;
use hashbrown::HashMap;

const LETTER: u8 = 1;
/// What may follow the letter behind a seam: nothing that a normalizer could combine with it.
const PLAIN: u8 = 2;
/// The last byte of a special token's text.
const MARK_END: u8 = 4;

/// What is left of a place where a text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// Nothing: the text begins.
    Start,
    /// A letter, or a newline before a letter.
    Text,
    /// A special token, with this id.
    Special(u32),
}

/// A place where a text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// In bytes.
    pub at: usize,
    pub edge: Edge,
    /// So many bytes behind it have to be seen: with them, tokens left of it don't depend on what follows.
    pub ahead: usize,
}

impl Cut {
    /// How many tokens lie before this cut, of a text that begins at `start`; None where no token ends there, or more than one.
    ///
    /// Behind a special token, marks that a tokenizer puts before the next section may end there too, and belong to it.
    pub fn tokens_before(&self, of: &Encoding, start: usize) -> Option<usize> {
        let end = self.at - start;
        let first = of.ends.partition_point(|&other| other < end);
        let fits = |at: usize| of.ends.get(at) == Some(&end);
        match self.edge {
            Edge::Start => Some(0),
            Edge::Special(id) => (fits(first) && of.ids[first] == id).then_some(first + 1),
            Edge::Text => (fits(first) && !fits(first + 1)).then_some(first + 1),
        }
    }
}

/// The seams of one tokenizer's texts.
pub struct Seams {
    classes: [u8; 256],
    newlines: bool,
    marks: HashMap<Box<[u8]>, u32>,
    /// Lengths of the special tokens' texts, the longest first.
    lengths: Vec<usize>,
}

impl Seams {
    /// `letters`: ASCII letters beside which a text is cut. `newlines`: also between a newline and one of them. `specials`: the
    /// special tokens behind which it is cut.
    pub fn new(letters: &str, newlines: bool, specials: Vec<(String, u32)>) -> Self {
        let mut classes = [0; 256];
        for plain in (b' '..=b'~').chain([b'\n']) {
            classes[plain as usize] |= PLAIN;
        }
        for letter in letters.bytes().filter(u8::is_ascii_alphabetic) {
            classes[letter as usize] |= LETTER;
        }
        let marks: HashMap<Box<[u8]>, u32> = specials
            .into_iter()
            .filter(|(text, _)| !text.is_empty())
            .map(|(text, id)| (text.into_bytes().into(), id))
            .collect();
        for mark in marks.keys() {
            classes[mark[mark.len() - 1] as usize] |= MARK_END;
        }
        let mut lengths: Vec<usize> = marks.keys().map(|mark| mark.len()).collect();
        lengths.sort_unstable_by(|one, two| two.cmp(one));
        lengths.dedup();
        Self { classes, newlines, marks, lengths }
    }

    /// All places where a text is cut, its beginning first; its end is not among them.
    pub fn cuts(&self, text: &str) -> Vec<Cut> {
        let bytes = text.as_bytes();
        let mut cuts = Vec::with_capacity(bytes.len() / 4 + 1);
        cuts.push(Cut { at: 0, edge: Edge::Start, ahead: 0 });
        let mut mark_end = 0;
        for at in 1..bytes.len() {
            let left = bytes[at - 1];
            let class = self.classes[left as usize];
            if class & MARK_END != 0
                && let Some(id) = self.mark(&bytes[mark_end..at])
            {
                mark_end = at;
                cuts.push(Cut { at, edge: Edge::Special(id), ahead: 0 });
            } else if class & LETTER != 0 && bytes[at] == b' ' && self.word(bytes, at + 1) {
                cuts.push(Cut { at, edge: Edge::Text, ahead: 3 });
            } else if left == b'\n' && self.newlines && self.word(bytes, at) {
                cuts.push(Cut { at, edge: Edge::Text, ahead: 2 });
            }
        }
        cuts
    }

    /// Whether a word begins here, and goes on or ends in a way that leaves its first letter alone.
    fn word(&self, bytes: &[u8], at: usize) -> bool {
        let is = |at: usize, class: u8| bytes.get(at).is_some_and(|&byte| self.classes[byte as usize] & class != 0);
        is(at, LETTER) && is(at + 1, PLAIN)
    }

    /// The special token that a text ends with: the longest one.
    fn mark(&self, text: &[u8]) -> Option<u32> {
        let fitting = self.lengths.iter().filter(|&&length| length <= text.len());
        fitting.filter_map(|length| self.marks.get(&text[text.len() - length..]).copied()).next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seams() -> Seams {
        Seams::new("abcdefghijklmnopqrstuvwxyz", true, vec![("<|end|>".into(), 7), ("<x>".into(), 8)])
    }

    fn places(text: &str) -> Vec<(usize, Edge)> {
        seams().cuts(text).iter().map(|cut| (cut.at, cut.edge)).collect()
    }

    #[test]
    fn words_newlines_and_special_tokens_part_a_text() {
        let found = places("one two\nthree<|end|> four.  five 6 seven");
        assert_eq!(found, [(0, Edge::Start), (3, Edge::Text), (8, Edge::Text), (20, Edge::Special(7))]);
        assert_eq!(places("a<x><x> bc"), [(0, Edge::Start), (4, Edge::Special(8)), (7, Edge::Special(8))]);
    }

    #[test]
    fn a_cut_is_seen_only_with_what_follows_it() {
        assert_eq!(places("one t"), [(0, Edge::Start)]);
        assert_eq!(places("one tw").len(), 2);
        assert_eq!(places("one e\u{301}"), [(0, Edge::Start)]); // a mark may change the letter before it
        assert_eq!(places(""), [(0, Edge::Start)]);
    }

    #[test]
    fn a_cut_needs_exactly_one_token_that_ends_there() {
        let of = |ids: &[u32], ends: &[usize]| Encoding { ids: ids.to_vec(), ends: ends.to_vec() };
        let text = Cut { at: 13, edge: Edge::Text, ahead: 3 };
        assert_eq!(text.tokens_before(&of(&[1, 2, 3], &[2, 3, 5]), 10), Some(2));
        assert_eq!(text.tokens_before(&of(&[1, 2, 3], &[2, 4, 5]), 10), None);
        assert_eq!(text.tokens_before(&of(&[1, 2, 3], &[2, 3, 3]), 10), None);
        let special = Cut { edge: Edge::Special(7), ..text };
        assert_eq!(special.tokens_before(&of(&[1, 7, 3], &[2, 3, 3]), 10), Some(2));
        assert_eq!(special.tokens_before(&of(&[1, 2, 7], &[2, 3, 3]), 10), None);
    }
}
