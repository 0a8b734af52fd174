//! The read path: from keys to who holds them.

use crate::keys::BlockKey;
use crate::promises::StreamName;
use crate::sets::SetId;
use crate::state::State;
use crate::table::RecordId;
use std::sync::Arc;

/// Keys looked for together, so that the processor waits for memory once for all of them.
const TOGETHER: usize = 32;

/// Consecutive keys that the same set of holders has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Position of the first.
    pub start: u32,
    /// Position after the last.
    pub end: u32,
    /// Who holds them.
    pub set: SetId,
}

/// What was found for some keys. Its set numbers hold as long as the state is not written to.
#[derive(Default)]
pub struct Found {
    /// Of keys that somebody holds, by position.
    pub runs: Vec<Run>,
    /// Positions of keys that a stream was promised, in order.
    pub promised: Vec<(u32, Arc<StreamName>)>,
}

/// Find who holds each key. Those found count as used: the first one last, since eviction takes a prefix from its end.
pub fn find(state: &State, keys: &[BlockKey], now_s: f64) -> Found {
    let shared = &state.shared;
    let blocks = &shared.blocks;
    let before = shared.recency.take(keys.len() as u64, now_s);
    let expired = shared.recency.expired(now_s);
    let mut runs: Vec<Run> = Vec::new();
    let mut position = 0;
    let mut tick = before + keys.len() as u64;
    let mut next: RecordId = 0;
    for together in keys.chunks(TOGETHER) {
        if !blocks.is_key_of(next, together[0]) {
            together.iter().for_each(|key| blocks.expect_key(blocks.place(*key)));
        }
        for key in together {
            let id = if blocks.is_key_of(next, *key) { Some(next) } else { blocks.find_key(*key) };
            if let Some(id) = id {
                next = id + 1;
                let set = blocks.set(id);
                if blocks.sets.held(set) > 0 && blocks.stamp_of(id) > expired {
                    blocks.stamp_at_least(id, tick);
                    match runs.last_mut() {
                        Some(run) if run.set == set && run.end == position => run.end += 1,
                        _ => runs.push(Run { start: position, end: position + 1, set }),
                    }
                }
            }
            position += 1;
            tick -= 1;
        }
    }
    let mut promised = Vec::new();
    if !shared.promises.is_empty() {
        for (position, key) in keys.iter().enumerate() {
            promised.extend(shared.promises.of(*key, now_s).map(|stream| (position as u32, stream.clone())));
        }
    }
    Found { runs, promised }
}
