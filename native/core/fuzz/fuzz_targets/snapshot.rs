//! Any bytes with a right header and checksum are restored or refused: without panic, without more memory than they are worth; and
//! what was restored can be used, written and restored again, evicted and dropped to the last record. In `native/core/fuzz`, with
//! cargo-fuzz installed:
//!
//! ```text
//! mkdir -p corpus/snapshot
//! cargo +nightly fuzz run snapshot corpus/snapshot seeds/snapshot -- -max_len=4096 -max_total_time=300
//! ```

#![no_main]

use kvatlas_core::events::{Batch, Event, Removed, Stored, Tier};
use kvatlas_core::index::Index;
use kvatlas_core::keys::{KeySchema, Mode};
use kvatlas_core::promises::StreamName;
use kvatlas_core::report::Limits;
use kvatlas_core::snapshot::seal;
use kvatlas_core::state::State;
use libfuzzer_sys::fuzz_target;

/// What every snapshot of this index begins with: magic, version, flags, schema.
const START: &[u8] = b"KVATLAS\0\x01\0\0\0\x04\0";

fuzz_target!(|body: &[u8]| {
    let bytes = seal([START, body].concat());
    let index = index(8);
    if index.restore(&bytes, 6, 5.0).is_err() {
        assert_eq!(index.stats().streams, 0);
        return;
    }
    let stats = index.stats();
    assert!(stats.blocks <= 8 && stats.blocks <= stats.entries);
    assert!(stats.bytes_estimated <= 100 * bytes.len() + (1 << 16));
    let again = self::index(usize::MAX);
    again.restore(&index.snapshot(6.0), 6, 100.0).expect("what was written can be read");
    assert_eq!(again.stats().entries, stats.entries);
    use_up(&index);
    use_up(&again);
});

fn index(blocks_max: usize) -> Index {
    let schema = KeySchema { block_size_tokens: 4, seed: "".into(), mode: Mode::Kvatlas };
    let limits = Limits { ttl_s: 10.0, blocks_max, bytes_max: 1 << 30, orphans_max: 4, retired_max: 4, promises_max: 4 };
    Index::new(State::new(schema, limits))
}

/// Events that name what may be known, evictions, and the end of all streams: nothing is left.
fn use_up(index: &Index) {
    let mut names: Vec<StreamName> = index.read().streams().map(|stream| (*stream.name).clone()).collect();
    names.truncate(8);
    for name in &names {
        let tiers: Vec<Tier> = index.read().tiers.names().iter().take(3).cloned().collect();
        let hashes: Vec<u64> = (0..16).collect();
        let stored = |tier: &Tier, size, parent, number: usize| {
            Event::Stored(Stored {
                hashes: number..number + 4,
                parent,
                tokens: 0..if size == 0 { 0 } else { 4 * size as usize },
                block_size_tokens: (size > 0).then_some(size),
                tier: tier.clone(),
                group: 0,
                spec: None,
                lora_name: None,
                extras: None,
            })
        };
        let mut events = Vec::new();
        for tier in &tiers {
            events.push(stored(tier, 0, None, 0));
            events.push(stored(tier, 2, Some(1), 4));
            events.push(stored(tier, 4, None, 0));
            events.push(Event::Removed(Removed { hashes: 0..12, tier: tier.clone(), group: None }));
        }
        events.push(Event::Cleared(None));
        let batch = Batch { timestamp_s: None, dp_rank: None, events, hashes, tokens: vec![1; 16] };
        index.apply(name, &batch, Some("m"), 7.0).expect("the stream is known");
    }
    index.expire(1e9);
    assert_eq!(index.stats().blocks, 0);
    let names: Vec<StreamName> = index.read().streams().map(|stream| (*stream.name).clone()).collect();
    for name in &names {
        index.drop_stream(name, true);
    }
    let stats = index.stats();
    assert_eq!((stats.entries, stats.orphans, stats.streams), (0, 0, 0));
}
