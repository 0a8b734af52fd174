//! The whole index as bytes, and back: to start again where another process ended.
//!
//! Integers are varints (7 bits a byte, the lowest first) unless they say u8, u16 or u64 (little endian); `x?` is a u8, 0 or 1,
//! and x if it is 1; `[x]` is a count and so many x; text is a count of bytes, and UTF-8.
//!
//! ```text
//! header    "KVATLAS\0", version u16, flags u16: 1 where keys are not ours, else 0
//! schema    block size in tokens, seed: text, with flag 1: mode: text ("llmd-xxh64", "engine sha256_cbor", ...)
//! tiers     [name: text], the device's first
//! evicted   keys by reason: ttl, size, bytes
//! streams   [stream?] by number, [number that is free] in the order in which they will be given again but backwards
//! sets      [kind u8: 0 Block, 1 Name; [slot, less the one before (the first: less 0); copies, unless the slot means "retired"]]
//! records   Blocks u64, Keys u64, Names u64: how many follow
//! Blocks    runs: set, count, tick (zigzag, less what a longer run before would go on with), count x (key u64, hash u64);
//!           in a run the set is the same and each tick one less than the one before it
//! Keys      each: key u64, tick (as a run of one), count of Names
//! Names     in the order of their Keys: hash u64, set
//! use       last tick, [ticks after this one, less the one before; age in seconds: f64]
//! trailer   XXH3-64 u64 of all before
//!
//! stream    pod: text, rank, model: text?, stale u8?, last event: f64?, young generation u8,
//!           groups [group, kind u8, window?, block size?], places [tier, group],
//!           orphans [hash u64, parent u64?, tokens [token]?, extras, copies], waiting [parent u64, [number of an orphan]],
//!           irregular blocks [hash u64, end, unfinished [hash u64], copies, generation u8 if they are none],
//!           chunks [key u64, [number of an irregular block]], then for each irregular block [number of a chunk]
//! end       key u64, tokens [token], extras
//! extras    [offset in tokens: zigzag, kind: text, value: bytes]
//! copies    [place, count], by place
//! ```
//!
//! What is not in it: records that nobody holds or remembers, promises (they end within seconds), and what follows from the rest:
//! a Key's holders, counters, roots, tables. The order of use is exact, as are ages, so both bounds go on where they were.
//!
//! A block costs its key and hash (16 bytes, which no code makes smaller) and a share of its run: about 0.05 bytes where prompts
//! are long, about 6 where every block has other holders or another time of use than the one before.
//!
//! The checksum finds accidents. A file that was made to deceive may contradict itself, but is read within its bounds: each
//! number is checked before it is used, memory stays in proportion to the file, what can be counted is counted anew. Two records
//! of one key are refused; a hash that a stream knows by two records is found by one of them.

mod bytes;
mod read;
mod write;

pub use bytes::seal;
pub(crate) use read::read;
pub(crate) use write::write;

use std::fmt;

const MAGIC: &[u8; 8] = b"KVATLAS\0";
const VERSION: u16 = 1;
const TRAILER: usize = 8;
/// Keys are not ours: their mode is told.
const OTHER_MODE: u16 = 1;

/// Why nothing was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotError {
    /// The index knows streams already.
    NotEmpty,
    /// The bytes are something else.
    NoSnapshot,
    /// It has a version or flags that are not known here.
    Version(u16, u16),
    /// It is not what was written: cut, or changed.
    Checksum,
    /// The keys in it were made in another way.
    Schema {
        /// What is different.
        field: &'static str,
        /// As it is in the snapshot.
        theirs: String,
        /// As it is here.
        ours: String,
    },
    /// It contradicts itself.
    Damaged {
        /// Where this was noticed.
        at_byte: usize,
        /// How.
        problem: &'static str,
    },
}

impl SnapshotError {
    /// What to do.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NotEmpty => "restore before anything is applied",
            Self::NoSnapshot => "pass what snapshot() returned, whole",
            Self::Version(..) => "restore with the version of kvatlas that wrote it, or start empty",
            Self::Checksum | Self::Damaged { .. } => "restore an older snapshot, or start empty",
            Self::Schema { .. } => "make the index with the schema of the snapshot, or start empty",
        }
    }
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotEmpty => write!(to, "the index is not empty"),
            Self::NoSnapshot => write!(to, "not a snapshot of kvatlas"),
            Self::Version(version, flags) => {
                write!(to, "version {version}, flags {flags}; known: version {VERSION}, flags 0 and {OTHER_MODE}")
            }
            Self::Checksum => write!(to, "the checksum does not fit: the snapshot was cut or changed"),
            Self::Schema { field, theirs, ours } => write!(to, "{field}: {theirs} in the snapshot, {ours} in the index"),
            Self::Damaged { at_byte, problem } => write!(to, "{problem} at byte {at_byte}"),
        }
    }
}

impl std::error::Error for SnapshotError {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Batch, Event, Stored, Tier};
    use crate::index::Index;
    use crate::keys::{KeySchema, Mode};
    use crate::promises::StreamName;
    use crate::report::Limits;
    use crate::state::State;

    fn empty() -> Index {
        let schema = KeySchema { block_size_tokens: 4, seed: "".into(), mode: Mode::Kvatlas };
        let limits = Limits {
            ttl_s: 1e9,
            blocks_max: 1 << 30,
            bytes_max: 1 << 40,
            orphans_max: 100,
            retired_max: 100,
            promises_max: 100,
        };
        Index::new(State::new(schema, limits))
    }

    fn filled(blocks: usize) -> Index {
        let index = empty();
        for (pod, first) in [("a", 0), ("b", 1_000_000), ("c", 0)] {
            let stored = Stored {
                hashes: 0..blocks,
                parent: None,
                tokens: 0..4 * blocks,
                block_size_tokens: Some(4),
                tier: Tier::gpu(),
                group: 0,
                spec: None,
                lora_name: None,
                extras: None,
            };
            let batch = Batch {
                events: vec![Event::Stored(stored)],
                hashes: (first..first + blocks as u64).collect(),
                tokens: (0..4 * blocks as u32).collect(),
                ..Batch::default()
            };
            index.apply(&StreamName { pod: pod.into(), dp_rank: 0 }, &batch, Some("m"), 1.0).expect("a free number");
        }
        index
    }

    #[test]
    fn what_was_restored_is_written_as_it_was() {
        let index = filled(5000);
        let snapshot = index.snapshot(2.0);
        let restored = empty();
        restored.restore(&snapshot, 0, 2.0).expect("a whole snapshot");
        assert_eq!(restored.stats().entries, 15_000);
        assert_eq!(restored.snapshot(2.0), snapshot);
    }

    #[test]
    fn a_snapshot_is_taken_beside_readers() {
        let index = filled(10);
        let reading = index.read();
        assert!(!index.snapshot(2.0).is_empty());
        assert_eq!(reading.stats().blocks, 10);
    }

    #[test]
    fn what_was_cut_is_refused_wherever_it_was_cut() {
        let snapshot = filled(3).snapshot(2.0);
        for length in 0..snapshot.len() {
            assert!(empty().restore(&snapshot[..length], 0, 2.0).is_err());
        }
        for length in 12..snapshot.len() - TRAILER {
            let cut = seal(snapshot[..length].to_vec());
            assert!(matches!(empty().restore(&cut, 0, 2.0), Err(SnapshotError::Damaged { .. })));
        }
    }
}
