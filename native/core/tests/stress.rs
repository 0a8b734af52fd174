//! Writers, readers and somebody who drops and forgets, all at once: no answer is of a form that could not be, and what is left
//! is what was held. Run it with a sanitizer to see races:
//!
//! ```text
//! RUSTFLAGS=-Zsanitizer=thread cargo +nightly test -p kvatlas-core --test stress -Zbuild-std --target x86_64-unknown-linux-gnu
//! ```

use kvatlas_core::events::{Batch, Event, Removed, Stored, Tier};
use kvatlas_core::index::Index;
use kvatlas_core::keys::{BlockKey, KeySchema, Mode};
use kvatlas_core::promises::StreamName;
use kvatlas_core::report::Limits;
use kvatlas_core::score::{Question, Scorer, Weights};
use kvatlas_core::slots::{is_held, slot_in, stream_of};
use kvatlas_core::state::State;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{scope, sleep};
use std::time::Duration;

const SIZE: usize = 4;
const BLOCKS: usize = if cfg!(miri) { 40 } else { 200 };
const LASTS: Duration = Duration::from_millis(if cfg!(miri) { 1 } else { 2000 });
const ROUNDS: u32 = if cfg!(miri) { 3 } else { u32::MAX };

fn schema() -> KeySchema {
    KeySchema { block_size_tokens: SIZE, seed: "".into(), mode: Mode::Kvatlas }
}

fn name(pod: usize) -> StreamName {
    StreamName { pod: format!("pod-{pod}").into(), dp_rank: 0 }
}

fn prompt() -> Vec<u32> {
    (0..(BLOCKS * SIZE) as u32).collect()
}

fn keys() -> Vec<BlockKey> {
    let mut keys = Vec::new();
    schema().keys_after(schema().root(b"model"), &prompt(), &mut keys);
    keys
}

fn stored() -> Batch {
    let event = Stored {
        hashes: 0..BLOCKS,
        parent: None,
        tokens: 0..BLOCKS * SIZE,
        block_size_tokens: Some(SIZE as u32),
        tier: Tier::gpu(),
        group: 0,
        spec: None,
        lora_name: None,
        extras: None,
    };
    Batch { events: vec![Event::Stored(event)], hashes: (1..=BLOCKS as u64).collect(), tokens: prompt(), ..Batch::default() }
}

/// From the chain's end, as engines do: at any time, what is held is a prefix.
fn removed() -> Batch {
    let event = Removed { hashes: 0..BLOCKS, tier: Tier::gpu(), group: Some(0) };
    Batch { events: vec![Event::Removed(event)], hashes: (1..=BLOCKS as u64).rev().collect(), ..Batch::default() }
}

fn index(blocks_max: usize) -> Index {
    let limits = Limits { ttl_s: 1e9, blocks_max, bytes_max: 1 << 40, orphans_max: 100, retired_max: 100, promises_max: 100 };
    Index::new(State::new(schema(), limits))
}

#[test]
fn readers_never_see_a_half_state_that_breaks_an_answer() {
    let index = index(1 << 20);
    let (is_over, answers) = (AtomicBool::new(false), AtomicU64::new(0));
    let (keys, stored, removed) = (keys(), stored(), removed());
    let holder = name(9);
    index.apply(&holder, &stored, Some("model"), 0.0).expect("there is room for a stream");
    let rounds = || (0..ROUNDS).take_while(|_| !is_over.load(Relaxed));
    scope(|threads| {
        for pod in 0..2 {
            let (index, stored, removed, rounds) = (&index, &stored, &removed, &rounds);
            threads.spawn(move || {
                for _ in rounds() {
                    index.apply(&name(pod), stored, Some("model"), 0.0).expect("there is room for a stream");
                    index.apply(&name(pod), removed, Some("model"), 0.0).expect("there is room for a stream");
                }
            });
        }
        threads.spawn(|| {
            for round in rounds() {
                index.apply(&name(5), &stored, Some("model"), 0.0).expect("there is room for a stream");
                index.promise(&name(6), &keys[..3], f64::from(round) + 1.0);
                index.drop_stream(&name(5), round % 2 == 0);
                index.expire(f64::from(round));
            }
        });
        for number in 0..2 {
            let (index, keys, holder, answers, rounds) = (&index, &keys, &holder, &answers, &rounds);
            threads.spawn(move || {
                for _ in rounds() {
                    if number == 0 {
                        lookup(index, keys)
                    } else {
                        score(index, keys, holder)
                    }
                    answers.fetch_add(1, Relaxed);
                }
            });
        }
        threads.spawn(|| {
            sleep(LASTS);
            is_over.store(true, Relaxed);
        });
    });
    for pod in 0..7 {
        index.drop_stream(&name(pod), true);
    }
    let stats = index.stats();
    assert_eq!((stats.blocks, stats.entries, stats.streams), (BLOCKS, BLOCKS, 1));
    assert!(answers.load(Relaxed) > 0);
}

fn lookup(index: &Index, keys: &[BlockKey]) {
    index.lookup(keys, 0.0, |state, found| {
        let mut reached = 0;
        for run in &found.runs {
            assert_eq!(run.start, reached, "one stream holds all blocks at all times");
            reached = run.end;
            let items = state.shared.blocks.sets.items(run.set);
            assert!(items.windows(2).all(|two| slot_in(two[0]) < slot_in(two[1])));
            for item in items.iter().filter(|item| is_held(**item)) {
                let stream = state.stream(stream_of(slot_in(*item)));
                assert_eq!(stream.place(slot_in(*item)), (0, 0));
            }
        }
        assert_eq!(reached as usize, BLOCKS);
    });
}

fn score(index: &Index, keys: &[BlockKey], holder: &StreamName) {
    let weights = Weights { by_tier: [("gpu".into(), 1.0)].into_iter().collect(), unknown: 0.1 };
    let question = Question {
        prompt_tokens: (BLOCKS * SIZE) as u64 + 1,
        block_tokens: SIZE as u64,
        pods: None,
        model: Some("model"),
        is_confined: false,
        scorer: Scorer::LongestPrefix,
        weights: &weights,
        stale_weight: 1.0,
    };
    let scores = index.score(keys, &question, 0.0);
    assert_eq!(scores.blocks_held as usize, BLOCKS);
    let mut names: Vec<_> = scores.streams.iter().map(|stream| stream.name.clone()).collect();
    names.sort();
    assert!(names.windows(2).all(|two| two[0] != two[1]), "a stream is scored once");
    for stream in &scores.streams {
        assert_eq!(stream.tiers.iter().map(|(_, count)| count).sum::<u32>(), stream.matched_blocks);
        assert_eq!(stream.score, f64::from(stream.matched_blocks));
        assert_eq!(stream.matched_tokens, u64::from(stream.matched_blocks) * SIZE as u64);
        assert!(*stream.name != *holder || stream.matched_blocks as usize == BLOCKS);
    }
    assert!(names.iter().any(|name| **name == *holder));
}

#[test]
fn readers_and_a_full_index_agree_on_how_much_there_is() {
    let index = index(BLOCKS / 2);
    let is_over = AtomicBool::new(false);
    let (keys, stored) = (keys(), stored());
    scope(|threads| {
        for pod in 0..2 {
            let (index, stored, is_over) = (&index, &stored, &is_over);
            threads.spawn(move || {
                for _ in (0..ROUNDS).take_while(|_| !is_over.load(Relaxed)) {
                    index.apply(&name(pod), stored, Some("model"), 0.0).expect("there is room for a stream");
                }
            });
        }
        threads.spawn(|| {
            for _ in (0..ROUNDS).take_while(|_| !is_over.load(Relaxed)) {
                let stats = index.stats();
                assert!(stats.blocks <= BLOCKS && stats.entries <= 2 * BLOCKS && stats.entries >= stats.blocks);
                index.lookup(&keys, 0.0, |_, found| {
                    assert!(found.runs.windows(2).all(|two| two[0].end <= two[1].start));
                });
            }
        });
        threads.spawn(|| {
            sleep(LASTS / 4);
            is_over.store(true, Relaxed);
        });
    });
    assert!(index.stats().blocks <= BLOCKS / 2);
}
