//! Any operations on an index, in any order, with bounds that are soon reached: after each step, all that is maintained is what
//! a count from scratch finds, and every answer makes sense. In `native/core/fuzz`, with cargo-fuzz installed:
//!
//! ```text
//! mkdir -p corpus/apply
//! cargo +nightly fuzz run apply corpus/apply seeds/decode -- -max_len=4096 -max_total_time=600
//! ```
//!
//! The crate's own sizes (pages, steps, how many sets or dead records are too many, streams, places, record numbers) are small
//! in a build for fuzzing, so that what happens at them is seen too.

#![no_main]

use kvatlas_core::decode::{Wire, decode};
use kvatlas_core::events::{AttentionKind, Batch, Event, Extra, GroupSpec, Removed, Stored, Tier};
use kvatlas_core::index::Index;
use kvatlas_core::keys::{KeySchema, Mode};
use kvatlas_core::promises::StreamName;
use kvatlas_core::report::Limits;
use kvatlas_core::score::{Question, Scorer, Scores, Weights};
use kvatlas_core::state::State;
use libfuzzer_sys::fuzz_target;

const STEPS_MAX: usize = 120;
const TIERS: [&str; 8] = ["gpu", "cpu", "disk", "storage", "a", "b", "c", "d"];
const BOUNDS: [usize; 8] = [0, 1, 2, 5, 12, 40, 200, 1 << 40];

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let first = input.byte();
    let block_tokens = usize::from(first % 4) + 1;
    let mode = match first >> 6 {
        0 => Mode::Kvatlas,
        1 => Mode::LlmdCborFnv,
        2 => Mode::LlmdXxh64,
        _ => Mode::Engine("sha256_cbor".into()),
    };
    let limits = Limits {
        ttl_s: [0.0, 1.0, 5.0, 30.0, 1e9, f64::INFINITY][input.below(6)],
        blocks_max: input.bound(),
        bytes_max: [0, 1000, 5000, 20_000, 1 << 40][input.below(5)],
        orphans_max: input.bound(),
        retired_max: input.bound(),
        promises_max: input.bound(),
    };
    let schema = KeySchema { block_size_tokens: block_tokens, seed: "".into(), mode };
    let mut world = World { index: Index::new(State::new(schema.clone(), limits)), schema, limits, now_s: 0.0 };
    for _ in 0..STEPS_MAX {
        if input.0.is_empty() {
            break;
        }
        world.step(&mut input);
        world.index.read().check();
    }
});

/// What is left of the input. Zeros follow it.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    fn bound(&mut self) -> usize {
        BOUNDS[self.below(BOUNDS.len())]
    }

    fn some(&mut self, count: usize) -> &'a [u8] {
        let (some, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        some
    }

    /// Mostly one of a few.
    fn hash(&mut self) -> u64 {
        match self.byte() {
            byte @ 0..=249 => u64::from(byte % 24),
            250 => u64::MAX,
            byte => u64::from(byte) << 32 | u64::from(self.byte()),
        }
    }

    fn name(&mut self) -> StreamName {
        let byte = self.byte();
        StreamName { pod: if byte & 1 == 0 { "a".into() } else { "b".into() }, dp_rank: u32::from(byte >> 1 & 3) }
    }

    fn tier(&mut self) -> Tier {
        let number = self.below(16);
        Tier::named(TIERS[if number < 8 { number % 2 } else { number - 8 }])
    }

    fn group(&mut self) -> u32 {
        [0, 0, 0, 1, 2, u32::MAX][self.below(6)]
    }

    fn extras(&mut self) -> Vec<Extra> {
        let extra = |byte: u8| Extra { offset_tokens: i64::from(byte as i8), kind: "mm".into(), value: [byte & 1].into() };
        let count = self.below(3);
        self.some(count).iter().map(|byte| extra(*byte)).collect()
    }

    fn spec(&mut self) -> Option<GroupSpec> {
        let kind = match self.byte() % 16 {
            0 => AttentionKind::Full,
            1 => AttentionKind::SlidingWindow,
            2 => AttentionKind::State,
            3 => AttentionKind::Ignored,
            _ => return None,
        };
        let window_tokens = [None, Some(1), Some(4), Some(9), Some(u64::MAX)][self.below(5)];
        let block_size_tokens = [None, Some(0), Some(1), Some(2), Some(3), Some(8), Some(u32::MAX)][self.below(7)];
        Some(GroupSpec { kind, window_tokens, block_size_tokens })
    }

    /// An event that keeps what a decoded one keeps.
    fn event(&mut self, block_tokens: usize, batch: &mut Batch) {
        let first = batch.hashes.len();
        let event = match self.byte() % 16 {
            0..=8 => {
                let count = match self.byte() {
                    byte @ 240.. => usize::from(byte - 230) * 3,
                    byte => usize::from(byte) % 6,
                };
                let start = self.hash();
                let in_a_row = self.byte() & 1 == 0;
                for number in 0..count as u64 {
                    let hash = if in_a_row { start.wrapping_add(number) } else { self.hash() };
                    batch.hashes.push(hash);
                }
                let size = [block_tokens, block_tokens, block_tokens, 1, 2, 3, 5, 0][self.below(8)];
                let given = match self.byte() % 8 {
                    0 => 0,
                    1 => size * count + 1,
                    2 => size * count.saturating_sub(1),
                    _ => size * count,
                };
                let from = batch.tokens.len();
                let alike = self.byte();
                batch.tokens.extend((0..given).map(|at| u32::from(alike >> (at / 4 % 8) & 1)));
                let flags = self.byte();
                Event::Stored(Stored {
                    hashes: first..batch.hashes.len(),
                    parent: (flags & 3 == 0).then(|| self.hash()),
                    tokens: from..batch.tokens.len(),
                    block_size_tokens: (size > 0 || flags & 4 == 0).then_some(size as u32),
                    tier: self.tier(),
                    group: self.group(),
                    spec: self.spec(),
                    lora_name: (flags & 48 == 48).then(|| "adapter".into()),
                    extras: (flags & 192 == 192).then(|| (0..count).map(|_| self.extras()).collect()),
                })
            }
            9..=13 => {
                let count = self.below(20);
                for _ in 0..count {
                    let hash = self.hash();
                    batch.hashes.push(hash);
                }
                let group = (self.byte() & 1 == 0).then(|| self.group());
                Event::Removed(Removed { hashes: first..batch.hashes.len(), tier: self.tier(), group })
            }
            _ => Event::Cleared((self.byte() & 1 == 0).then(|| self.tier())),
        };
        batch.events.push(event);
    }
}

struct World {
    index: Index,
    schema: KeySchema,
    limits: Limits,
    now_s: f64,
}

impl World {
    fn step(&mut self, input: &mut Input) {
        match input.byte() % 32 {
            0..=15 => {
                let mut batch = Batch::default();
                for _ in 0..=input.below(3) {
                    input.event(self.schema.block_size_tokens, &mut batch);
                }
                let name = input.name();
                self.apply(&name, &batch, input.byte());
            }
            16..=17 => {
                let name = input.name();
                let wire = if input.byte() & 1 == 0 { Wire::Vllm } else { Wire::Sglang };
                let count = usize::from(input.byte()) * 4;
                let mut batch = Batch::default();
                if decode(input.some(count), wire, &mut batch).is_ok() {
                    self.apply(&name, &batch, input.byte());
                }
            }
            18 => _ = self.index.drop_stream(&input.name(), false),
            19 => _ = self.index.drop_stream(&input.name(), true),
            20..=21 => {
                let name = input.name();
                let end_s = self.now_s + f64::from(input.byte() as i8);
                self.index.promise(&name, &self.keys(input), end_s);
            }
            22..=23 => self.lookup(input),
            24..=26 => self.score(input),
            27 => self.now_s += f64::from(input.byte()) / 8.0,
            28 => self.now_s -= f64::from(input.byte() % 4),
            29 => _ = self.index.expire(self.now_s),
            30 => _ = self.index.mark(&input.name(), (input.byte() & 1 == 0).then_some(7)),
            _ => {
                let stats = self.index.stats();
                assert!(stats.blocks <= stats.entries && stats.pods <= stats.streams);
            }
        }
    }

    fn apply(&self, name: &StreamName, batch: &Batch, flags: u8) {
        let model = [None, Some(""), Some("one"), Some("other")][usize::from(flags & 3)];
        let Ok(report) = self.index.apply(name, batch, model, self.now_s) else { return };
        let named = |event: &Event| match event {
            Event::Stored(event) => event.hashes.len() as u64,
            _ => 0,
        };
        assert!(report.stored <= batch.events.iter().map(named).sum::<u64>());
        assert!(report.duplicates <= report.stored && report.refused <= report.stored + batch.hashes.len() as u64);
        let state = self.index.read();
        let stats = state.stats();
        assert!(stats.blocks <= self.limits.blocks_max);
        let is_empty = stats.blocks == 0 && stats.orphans == 0 && stats.speculative == 0;
        assert!(stats.bytes_estimated <= self.limits.bytes_max || is_empty, "over the bound in bytes");
        assert!(state.streams().all(|stream| stream.orphans.len() <= self.limits.orphans_max), "over the bound of orphans");
    }

    /// Keys of a prompt, and a few that are none.
    fn keys(&self, input: &mut Input) -> Vec<u64> {
        let mut keys = Vec::new();
        let blocks = input.below(20);
        let alike = input.byte();
        let tokens: Vec<u32> =
            (0..blocks * self.schema.block_size_tokens).map(|at| u32::from(alike >> (at / 4 % 8) & 1)).collect();
        let model: &[u8] = [&b""[..], b"one", b"other", b"adapter"][input.below(4)];
        self.schema.keys_after(self.schema.root(model), &tokens, &mut keys);
        if input.byte() & 7 == 0 {
            keys.extend(input.some(3).iter().map(|byte| u64::from(*byte)));
            let by = 1.min(keys.len());
            keys.rotate_left(by);
            keys.extend_from_within(..);
        }
        keys
    }

    fn lookup(&self, input: &mut Input) {
        let keys = self.keys(input);
        self.index.lookup(&keys, self.now_s, |state, found| {
            let mut reached = 0;
            for run in &found.runs {
                assert!(run.start >= reached && run.end > run.start && run.end as usize <= keys.len());
                assert!(state.shared.blocks.sets.held(run.set) > 0);
                reached = run.end;
            }
            assert!(found.promised.iter().all(|(position, _)| (*position as usize) < keys.len()));
        });
    }

    fn score(&self, input: &mut Input) {
        let keys = self.keys(input);
        let flags = input.byte();
        let weights = Weights {
            by_tier: [("gpu".into(), 1.0), ("cpu".into(), f64::from(input.byte()) / 100.0)].into_iter().collect(),
            unknown: [0.0, 0.1, 2.0][input.below(3)],
        };
        let question = Question {
            prompt_tokens: (keys.len() * self.schema.block_size_tokens) as u64 + u64::from(flags & 1),
            block_tokens: self.schema.block_size_tokens as u64,
            pods: (flags & 2 == 0).then_some(&["a", "nobody"]),
            model: [None, Some("one"), Some("")][input.below(3)],
            is_confined: flags & 4 == 4,
            scorer: [Scorer::LongestPrefix, Scorer::HighestBlockHit, Scorer::Coverage][input.below(3)],
            weights: &weights,
            stale_weight: 0.5,
        };
        let Scores { streams, blocks_held } = self.index.score(&keys, &question, self.now_s);
        assert!(blocks_held as usize <= keys.len());
        for stream in streams {
            assert!(stream.score.is_finite() && stream.score >= 0.0);
            assert!(stream.matched_blocks as usize <= keys.len() && stream.speculative <= stream.matched_blocks);
            assert_eq!(stream.matched_tokens, u64::from(stream.matched_blocks) * question.block_tokens);
            assert!(stream.cached_tokens <= stream.matched_tokens);
            assert!(stream.cached_tokens < question.prompt_tokens.max(1));
            assert_eq!(stream.tiers.iter().map(|(_, count)| count).sum::<u32>(), stream.matched_blocks);
            assert!(question.pods.is_none_or(|pods| pods.contains(&&*stream.name.pod)));
        }
    }
}
