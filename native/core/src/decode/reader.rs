//! msgpack read from a slice: each method takes one value off its front, or is [`Unusual`] for another type or a cut end.

use super::Unusual;

/// Levels of arrays and maps in a value that is skipped.
const DEPTH_MAX: u32 = 32;

/// What is left to be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// That nothing is left.
    pub(super) fn end(&self) -> Result<(), Unusual> {
        if self.rest.is_empty() { Ok(()) } else { Err(Unusual) }
    }

    #[inline]
    fn byte(&mut self) -> Result<u8, Unusual> {
        let (&first, rest) = self.rest.split_first().ok_or(Unusual)?;
        self.rest = rest;
        Ok(first)
    }

    #[inline]
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Unusual> {
        let (bytes, rest) = self.rest.split_at_checked(count).ok_or(Unusual)?;
        self.rest = rest;
        Ok(bytes)
    }

    #[inline]
    fn chunk<const N: usize>(&mut self) -> Result<[u8; N], Unusual> {
        let (chunk, rest) = self.rest.split_first_chunk().ok_or(Unusual)?;
        self.rest = rest;
        Ok(*chunk)
    }

    #[inline]
    fn u8(&mut self) -> Result<usize, Unusual> {
        Ok(usize::from(self.byte()?))
    }

    #[inline]
    fn u16(&mut self) -> Result<usize, Unusual> {
        Ok(usize::from(u16::from_be_bytes(self.chunk()?)))
    }

    #[inline]
    fn u32(&mut self) -> Result<usize, Unusual> {
        usize::try_from(u32::from_be_bytes(self.chunk()?)).map_err(|_| Unusual)
    }

    /// Whether a nil stood there, which is then taken.
    #[inline]
    pub(super) fn nil(&mut self) -> bool {
        match self.rest {
            [0xC0, rest @ ..] => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// The number of elements of an array. No more than bytes are left: each takes one at least.
    #[inline]
    pub(super) fn array(&mut self) -> Result<usize, Unusual> {
        let count = match self.byte()? {
            marker @ 0x90..=0x9F => usize::from(marker & 0x0F),
            0xDC => self.u16()?,
            0xDD => self.u32()?,
            _ => return Err(Unusual),
        };
        if count > self.rest.len() { Err(Unusual) } else { Ok(count) }
    }

    /// Whether a map comes next.
    #[inline]
    pub(super) fn at_map(&self) -> bool {
        matches!(self.rest.first(), Some(0x80..=0x8F | 0xDE | 0xDF))
    }

    /// The number of pairs of a map.
    #[inline]
    pub(super) fn map(&mut self) -> Result<usize, Unusual> {
        match self.byte()? {
            marker @ 0x80..=0x8F => Ok(usize::from(marker & 0x0F)),
            0xDE => self.u16(),
            0xDF => self.u32(),
            _ => Err(Unusual),
        }
    }

    /// The bytes of a string, not yet known to be UTF-8.
    #[inline]
    pub(super) fn str_bytes(&mut self) -> Result<&'a [u8], Unusual> {
        let count = match self.byte()? {
            marker @ 0xA0..=0xBF => usize::from(marker & 0x1F),
            0xD9 => self.u8()?,
            0xDA => self.u16()?,
            0xDB => self.u32()?,
            _ => return Err(Unusual),
        };
        self.bytes(count)
    }

    pub(super) fn str(&mut self) -> Result<&'a str, Unusual> {
        utf8(self.str_bytes()?)
    }

    pub(super) fn str_or_nil(&mut self) -> Result<Option<&'a str>, Unusual> {
        if self.nil() { Ok(None) } else { self.str().map(Some) }
    }

    pub(super) fn at_str(&self) -> bool {
        matches!(self.rest.first(), Some(0xA0..=0xBF | 0xD9..=0xDB))
    }

    pub(super) fn at_bin(&self) -> bool {
        matches!(self.rest.first(), Some(0xC4..=0xC6))
    }

    /// The content of a byte string.
    pub(super) fn bin(&mut self) -> Result<&'a [u8], Unusual> {
        let count = match self.byte()? {
            0xC4 => self.u8()?,
            0xC5 => self.u16()?,
            0xC6 => self.u32()?,
            _ => return Err(Unusual),
        };
        self.bytes(count)
    }

    /// An integer of either sign, up to 64 bits.
    pub(super) fn int(&mut self) -> Result<i128, Unusual> {
        Ok(match self.byte()? {
            marker @ 0..=0x7F => i128::from(marker),
            0xCC => i128::from(self.byte()?),
            0xCD => i128::from(u16::from_be_bytes(self.chunk()?)),
            0xCE => i128::from(u32::from_be_bytes(self.chunk()?)),
            0xCF => i128::from(u64::from_be_bytes(self.chunk()?)),
            0xD0 => i128::from(i8::from_be_bytes(self.chunk()?)),
            0xD1 => i128::from(i16::from_be_bytes(self.chunk()?)),
            0xD2 => i128::from(i32::from_be_bytes(self.chunk()?)),
            0xD3 => i128::from(i64::from_be_bytes(self.chunk()?)),
            marker @ 0xE0.. => i128::from(i8::from_be_bytes([marker])),
            _ => return Err(Unusual),
        })
    }

    pub(super) fn int_or_nil(&mut self) -> Result<Option<i128>, Unusual> {
        if self.nil() { Ok(None) } else { self.int().map(Some) }
    }

    /// A block's hash as 64 bits: those of an integer of either sign, or the last 8 bytes of a digest, big endian.
    #[inline]
    pub(super) fn hash(&mut self) -> Result<u64, Unusual> {
        if let [0xCF, rest @ ..] = self.rest {
            let (bits, rest) = rest.split_first_chunk().ok_or(Unusual)?;
            self.rest = rest;
            return Ok(u64::from_be_bytes(*bits));
        }
        self.rarer_hash()
    }

    fn rarer_hash(&mut self) -> Result<u64, Unusual> {
        if !self.at_bin() {
            return Ok(self.int()? as u64); // two's complement: the same bits
        }
        let digest = self.bin()?;
        match digest.last_chunk() {
            Some(bits) => Ok(u64::from_be_bytes(*bits)),
            None if digest.is_empty() => Err(Unusual),
            None => Ok(digest.iter().fold(0, |hash, &byte| hash << 8 | u64::from(byte))),
        }
    }

    /// A finite number of seconds, or nil.
    pub(super) fn time(&mut self) -> Result<Option<f64>, Unusual> {
        let time_s = match self.rest.first() {
            Some(0xC0) => {
                self.byte()?;
                return Ok(None);
            }
            Some(0xCA) => {
                self.byte()?;
                f64::from(f32::from_be_bytes(self.chunk()?))
            }
            Some(0xCB) => {
                self.byte()?;
                f64::from_be_bytes(self.chunk()?)
            }
            _ => self.int()? as f64,
        };
        if time_s.is_finite() { Ok(Some(time_s)) } else { Err(Unusual) }
    }

    /// Fill `tokens`; each must be there and fit.
    #[inline]
    pub(super) fn tokens(&mut self, tokens: &mut [u32]) -> Result<(), Unusual> {
        self.rest = super::tokens::fill(tokens, self.rest)?;
        Ok(())
    }

    /// Pass over one value of any type but an extension. Strings in it are UTF-8.
    pub(super) fn skip(&mut self) -> Result<(), Unusual> {
        self.skip_within(DEPTH_MAX)
    }

    fn skip_within(&mut self, depth_left: u32) -> Result<(), Unusual> {
        match self.rest.first().ok_or(Unusual)? {
            0..=0x7F | 0xC0 | 0xC2 | 0xC3 | 0xE0.. => self.byte().map(drop),
            0x90..=0x9F | 0xDC | 0xDD => {
                let count = self.array()?;
                self.skip_each(count, depth_left)
            }
            0x80..=0x8F | 0xDE | 0xDF => {
                let count = self.map()?.checked_mul(2).ok_or(Unusual)?;
                self.skip_each(count, depth_left)
            }
            0xA0..=0xBF | 0xD9..=0xDB => self.str().map(drop),
            0xC4..=0xC6 => self.bin().map(drop),
            0xCC..=0xD3 => self.int().map(drop),
            0xCA => self.bytes(5).map(drop),
            0xCB => self.bytes(9).map(drop),
            0xC1 | 0xC7..=0xC9 | 0xD4..=0xD8 => Err(Unusual),
        }
    }

    fn skip_each(&mut self, count: usize, depth_left: u32) -> Result<(), Unusual> {
        let depth_left = depth_left.checked_sub(1).ok_or(Unusual)?;
        for _ in 0..count {
            self.skip_within(depth_left)?;
        }
        Ok(())
    }
}

pub(super) fn utf8(bytes: &[u8]) -> Result<&str, Unusual> {
    std::str::from_utf8(bytes).map_err(|_| Unusual)
}
