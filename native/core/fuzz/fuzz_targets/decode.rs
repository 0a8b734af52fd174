//! Any bytes are decoded or refused: without panic, without more memory than they are worth, and never into a batch that
//! contradicts itself. In `native/core/fuzz`, with cargo-fuzz installed:
//!
//! ```text
//! mkdir -p corpus/decode
//! cargo +nightly fuzz run decode corpus/decode seeds/decode -- -dict=decode.dict -max_total_time=300
//! ```

#![no_main]

use kvatlas_core::decode::{Wire, decode};
use kvatlas_core::events::{Batch, Event};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|payload: &[u8]| {
    let mut batch = Batch::default();
    for wire in [Wire::Vllm, Wire::Sglang] {
        let read = decode(payload, wire, &mut batch);
        assert!(batch.hashes.len() <= payload.len() && batch.tokens.len() <= payload.len());
        if read.is_err() {
            continue; // the batch is unspecified: let the next payload find it so
        }
        check(&batch);
        let mut fresh = Batch::default();
        assert_eq!(decode(payload, wire, &mut fresh), Ok(()));
        assert_eq!(fresh, batch);
    }
});

/// What a reader of a batch relies on.
fn check(batch: &Batch) {
    assert!(batch.timestamp_s.is_none_or(f64::is_finite));
    assert!(batch.dp_rank.is_none_or(|rank| rank <= 0xFFFF));
    let (mut hashes_end, mut tokens_end) = (0, 0);
    for event in &batch.events {
        let (hashes, tier) = match event {
            Event::Cleared(tier) => (hashes_end..hashes_end, tier.as_ref()),
            Event::Removed(event) => (event.hashes.clone(), Some(&event.tier)),
            Event::Stored(event) => {
                assert_eq!(event.tokens.start, tokens_end);
                tokens_end = event.tokens.end;
                assert!(event.tokens.start <= event.tokens.end);
                assert!(event.block_size_tokens.map_or(event.tokens.is_empty(), |size| size > 0));
                assert!(event.extras.as_ref().is_none_or(|extras| extras.len() == event.hashes.len()));
                assert!(event.lora_name.as_deref() != Some(""));
                (event.hashes.clone(), Some(&event.tier))
            }
        };
        assert!(hashes.start == hashes_end && hashes.end >= hashes.start);
        hashes_end = hashes.end;
        assert!(tier.is_none_or(|tier| !tier.0.is_empty() && tier.0.to_lowercase() == *tier.0));
    }
    assert_eq!((hashes_end, tokens_end), (batch.hashes.len(), batch.tokens.len()));
}
