//! What an answer tells while it passes. `kvatlas.serve.routing.answers.AnswerReader` is the same in Python.

use crate::limits::TAIL_BYTES_MAX;
use memchr::memmem;

/// Takes an answer's body piece by piece, however it is cut.
pub struct Tap {
    /// It is a stream of server-sent events.
    pub events: bool,
    started: bool,
    tail: Vec<u8>,
}

impl Tap {
    /// Nothing came yet.
    pub fn new(events: bool) -> Self {
        Self { events, started: false, tail: Vec::new() }
    }

    /// Take a piece; whether the first token came with it.
    pub fn feed(&mut self, piece: &[u8]) -> bool {
        let seen = self.tail.len().saturating_sub(b"data:".len() - 1);
        self.tail.extend_from_slice(piece);
        if self.started || piece.is_empty() || (self.events && memmem::find(&self.tail[seen..], b"data:").is_none()) {
            self.trim();
            return false;
        }
        self.trim();
        self.started = true;
        true
    }

    /// Whether nothing of an event came without its rest.
    pub fn is_between_events(&self) -> bool {
        self.events && (self.tail.is_empty() || self.tail.ends_with(b"\n\n"))
    }

    /// The end of what came. Nothing is left here.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.tail)
    }

    fn trim(&mut self) {
        if self.tail.len() > 2 * TAIL_BYTES_MAX {
            self.tail.drain(..self.tail.len() - TAIL_BYTES_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_streams_first_token_comes_with_its_first_data_however_it_is_cut() {
        let mut stream = Tap::new(true);
        assert!(!stream.feed(b": comment\n\nda"));
        assert!(stream.feed(b"ta: {}"));
        assert!(!stream.feed(b"data: {}"));
    }

    #[test]
    fn another_answers_first_token_comes_with_its_first_byte() {
        let mut whole = Tap::new(false);
        assert!(!whole.feed(b""));
        assert!(whole.feed(b"{"));
        assert!(!whole.feed(b"}"));
    }

    #[test]
    fn of_a_long_answer_the_end_is_kept() {
        let mut long = Tap::new(false);
        for piece in 0..100u8 {
            long.feed(&[piece; 1000]);
            assert!(long.tail.len() <= 2 * TAIL_BYTES_MAX);
        }
        assert!(long.tail.len() >= TAIL_BYTES_MAX && long.tail.ends_with(&[99; 1000]));
    }
}
