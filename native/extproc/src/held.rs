//! A request's body while it is incomplete: bounded for each, and for all together.

use bytes::{Bytes, BytesMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many bytes of bodies are held, of all streams together.
#[derive(Debug)]
pub struct Room {
    bytes_max: u64,
    used: AtomicU64,
}

impl Room {
    /// Room for so many.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max, used: AtomicU64::new(0) }
    }

    /// Bytes that are held.
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, count: u64) -> bool {
        let more = |used: u64| used.checked_add(count).filter(|all| *all <= self.bytes_max);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    fn give(&self, count: u64) {
        self.used.fetch_sub(count, Ordering::Relaxed);
    }
}

/// The pieces of one body. Dropped, it gives its room back.
pub struct HeldBody {
    room: Arc<Room>,
    first: Bytes,
    rest: BytesMut,
    /// How many pieces came: in some modes each needs an answer.
    pub messages: usize,
}

impl HeldBody {
    /// None yet.
    pub fn new(room: Arc<Room>) -> Self {
        Self { room, first: Bytes::new(), rest: BytesMut::new(), messages: 0 }
    }

    /// Of all pieces.
    pub fn size_bytes(&self) -> u64 {
        (self.first.len() + self.rest.len()) as u64
    }

    /// Whether there was room for a further piece.
    pub fn add(&mut self, piece: Bytes) -> bool {
        if !self.room.take(piece.len() as u64) {
            return false;
        }
        self.messages += 1;
        if self.size_bytes() == 0 {
            self.first = piece; // mostly the only one
        } else {
            self.rest.extend_from_slice(&piece);
        }
        true
    }

    /// The body. Pieces are put together for it; asking again costs nothing.
    pub fn whole(&mut self) -> Bytes {
        if !self.rest.is_empty() {
            let mut all = BytesMut::from(std::mem::take(&mut self.first));
            all.unsplit(std::mem::take(&mut self.rest));
            self.first = all.freeze();
        }
        self.first.clone()
    }

    /// Forget the pieces. May be called again.
    pub fn clear(&mut self) {
        self.room.give(self.size_bytes());
        self.first = Bytes::new();
        self.rest = BytesMut::new();
    }
}

impl Drop for HeldBody {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(room: &Arc<Room>, pieces: &[&'static str]) -> HeldBody {
        let mut body = HeldBody::new(room.clone());
        assert!(pieces.iter().all(|piece| body.add(Bytes::from_static(piece.as_bytes()))));
        body
    }

    #[test]
    fn a_body_is_whole_however_it_was_cut() {
        let room = Arc::new(Room::new(100));
        for pieces in [&["onetwo"][..], &["one", "two"], &["", "o", "", "netwo", ""]] {
            let mut body = held(&room, pieces);
            assert_eq!((body.whole(), body.messages, body.size_bytes()), (Bytes::from_static(b"onetwo"), pieces.len(), 6));
            assert_eq!((body.whole(), room.used_bytes()), (Bytes::from_static(b"onetwo"), 6));
        }
    }

    #[test]
    fn room_is_shared_and_given_back_once() {
        let room = Arc::new(Room::new(5));
        let (mut first, mut second) = (held(&room, &["123"]), held(&room, &["4"]));
        assert!(!second.add(Bytes::from_static(b"56")));
        assert_eq!((room.used_bytes(), second.size_bytes()), (4, 1));
        first.clear();
        drop(first);
        assert!(second.add(Bytes::from_static(b"56")));
        drop(second);
        assert_eq!(room.used_bytes(), 0);
    }
}
