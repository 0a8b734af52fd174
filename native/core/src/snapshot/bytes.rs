//! Numbers and texts as bytes, and back within bounds.

use super::{MAGIC, OTHER_MODE, SnapshotError, TRAILER, VERSION};
use xxhash_rust::xxh3::xxh3_64;

/// End a snapshot: append the checksum of all that is there.
pub fn seal(mut snapshot: Vec<u8>) -> Vec<u8> {
    let checksum = xxh3_64(&snapshot);
    snapshot.extend_from_slice(&checksum.to_le_bytes());
    snapshot
}

pub(super) trait Put {
    fn header(&mut self, flags: u16);
    fn u64(&mut self, value: u64);
    fn varint(&mut self, value: u64);
    fn count(&mut self, count: usize);
    fn zigzag(&mut self, value: i64);
    fn text(&mut self, text: &[u8]);
    fn maybe<T>(&mut self, value: Option<T>, put: impl FnOnce(&mut Self, T));
}

impl Put for Vec<u8> {
    fn header(&mut self, flags: u16) {
        self.extend_from_slice(MAGIC);
        self.extend_from_slice(&VERSION.to_le_bytes());
        self.extend_from_slice(&flags.to_le_bytes());
    }

    #[inline]
    fn u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    #[inline]
    fn varint(&mut self, mut value: u64) {
        while value >= 1 << 7 {
            self.push(value as u8 | 1 << 7);
            value >>= 7;
        }
        self.push(value as u8);
    }

    fn count(&mut self, count: usize) {
        self.varint(count as u64);
    }

    #[inline]
    fn zigzag(&mut self, value: i64) {
        self.varint((value << 1 ^ value >> 63) as u64);
    }

    fn text(&mut self, text: &[u8]) {
        self.count(text.len());
        self.extend_from_slice(text);
    }

    fn maybe<T>(&mut self, value: Option<T>, put: impl FnOnce(&mut Self, T)) {
        self.push(u8::from(value.is_some()));
        if let Some(value) = value {
            put(self, value);
        }
    }
}

/// What is left to read.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Of the header.
    pub flags: u16,
}

pub(super) type Read<T> = Result<T, SnapshotError>;

impl<'a> Reader<'a> {
    /// What is between header and trailer, if these are right.
    pub fn open(snapshot: &'a [u8]) -> Read<Self> {
        let start = MAGIC.len() + 4;
        if !snapshot.starts_with(MAGIC) || snapshot.len() < start {
            return Err(SnapshotError::NoSnapshot);
        }
        let u16_at = |at: usize| u16::from_le_bytes([snapshot[at], snapshot[at + 1]]);
        let (version, flags) = (u16_at(start - 4), u16_at(start - 2));
        if version != VERSION || !matches!(flags, 0 | OTHER_MODE) {
            return Err(SnapshotError::Version(version, flags));
        }
        let end = snapshot.len() - TRAILER.min(snapshot.len() - start);
        let (bytes, trailer) = snapshot.split_at(end);
        if trailer != xxh3_64(bytes).to_le_bytes() {
            return Err(SnapshotError::Checksum);
        }
        Ok(Self { bytes, at: start, flags })
    }

    /// It contradicts itself just before here.
    pub fn damaged<T>(&self, problem: &'static str) -> Read<T> {
        Err(SnapshotError::Damaged { at_byte: self.at, problem })
    }

    /// `problem`, unless `is_right`.
    #[inline]
    pub fn check(&self, is_right: bool, problem: &'static str) -> Read<()> {
        if is_right { Ok(()) } else { self.damaged(problem) }
    }

    #[inline]
    pub fn take(&mut self, count: usize) -> Read<&'a [u8]> {
        match self.bytes[self.at..].get(..count) {
            Some(taken) => {
                self.at += count;
                Ok(taken)
            }
            None => self.damaged("it ends too early"),
        }
    }

    #[inline]
    pub fn u8(&mut self) -> Read<u8> {
        Ok(self.take(1)?[0])
    }

    /// A u8 below `end`.
    pub fn u8_below(&mut self, end: u8) -> Read<u8> {
        let value = self.u8()?;
        self.check(value < end, "an unknown code").map(|()| value)
    }

    #[inline]
    pub fn u64(&mut self) -> Read<u64> {
        let bytes = self.take(8)?;
        Ok(bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }

    pub fn f64(&mut self) -> Read<f64> {
        self.u64().map(f64::from_bits)
    }

    #[inline]
    pub fn varint(&mut self) -> Read<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7F);
            self.check(bits << shift >> shift == bits, "a number beyond 64 bits")?;
            value |= bits << shift;
            if byte < 1 << 7 {
                return Ok(value);
            }
        }
        self.damaged("a number beyond 64 bits")
    }

    #[inline]
    pub fn zigzag(&mut self) -> Read<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    #[inline]
    pub fn u32(&mut self) -> Read<u32> {
        match u32::try_from(self.varint()?) {
            Ok(value) => Ok(value),
            Err(_) => self.damaged("a number beyond 32 bits"),
        }
    }

    /// A number below `end`.
    #[inline]
    pub fn below(&mut self, end: usize, problem: &'static str) -> Read<usize> {
        let value = self.varint()?;
        self.check(value < end as u64, problem).map(|()| value as usize)
    }

    /// A count of things that take so many bytes each at least: no more than there are bytes for.
    pub fn count(&mut self, bytes_each: usize) -> Read<usize> {
        let count = self.varint()?;
        self.room_for(count, bytes_each)
    }

    /// As [`Reader::count`], of a count already read.
    pub fn room_for(&self, count: u64, bytes_each: usize) -> Read<usize> {
        let most = (self.bytes.len() - self.at) / bytes_each;
        self.check(count <= most as u64, "a count beyond what follows").map(|()| count as usize)
    }

    /// A count, and so many of what `one` reads.
    pub fn list<T>(&mut self, bytes_each: usize, mut one: impl FnMut(&mut Self) -> Read<T>) -> Read<Vec<T>> {
        let count = self.count(bytes_each)?;
        (0..count).map(|_| one(self)).collect()
    }

    pub fn maybe<T>(&mut self, one: impl FnOnce(&mut Self) -> Read<T>) -> Read<Option<T>> {
        if self.u8_below(2)? == 1 { one(self).map(Some) } else { Ok(None) }
    }

    pub fn bytes(&mut self) -> Read<&'a [u8]> {
        let count = self.count(1)?;
        self.take(count)
    }

    pub fn text(&mut self) -> Read<&'a str> {
        let bytes = self.bytes()?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(_) => self.damaged("a text that is not UTF-8"),
        }
    }

    pub fn end(&self) -> Read<()> {
        self.check(self.at == self.bytes.len(), "more follows than belongs to it")
    }
}
