//! The index, for many readers and writers.
//!
//! Writers take turns; readers never wait for a turn's end. A writer changes the state in steps of some microseconds, and between
//! two steps lets every reader in that waits. Readers change nothing but the time of use, without a lock.

use crate::events::{Batch, Event, Stored};
use crate::find::{Found, find};
use crate::keys::BlockKey;
use crate::promises::StreamName;
use crate::report::{Report, Stats};
use crate::score::{Question, Scores, score};
use crate::slots::{Slot, StreamId};
use crate::snapshot::{self, SnapshotError};
use crate::state::{Naming, STEP_BLOCKS, State, Storing};
use crate::victims::Victims;
use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use smallvec::SmallVec;
use std::hint::spin_loop;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

/// Holder sets that it looks at.
const STEP_SETS: u32 = crate::size(256, 3) as u32;
/// Records that it looks at for dead ones.
const STEP_RECORDS: u32 = crate::size(64, 7) as u32;
/// A writer that waited so long for a pause of the readers gets one.
const PATIENCE: Duration = Duration::from_millis(1);

/// More streams than there are numbers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyStreams;

/// The index.
pub struct Index {
    turn: Mutex<()>,
    state: RwLock<State>,
    readers_waiting: AtomicU32,
    writer_is_starved: AtomicBool,
}

/// A writer's turn.
pub struct Turn<'a> {
    index: &'a Index,
    state: Option<RwLockWriteGuard<'a, State>>,
    /// Blocks changed since readers were let in.
    changed: usize,
    /// The stream that events were applied to last.
    stream: Option<(StreamName, StreamId)>,
    _turn: MutexGuard<'a, ()>,
}

impl Turn<'_> {
    fn state(&mut self) -> &mut State {
        self.state.get_or_insert_with(|| self.index.lock())
    }

    /// Let readers in.
    fn pause(&mut self) {
        self.state = None;
        self.changed = 0;
        let mut rounds = 0;
        while self.index.readers_waiting.load(SeqCst) > 0 && rounds < 1000 {
            rounds += 1;
            if rounds % 100 == 0 {
                std::thread::yield_now();
            }
            spin_loop();
        }
    }
}

impl Index {
    /// An index with a state.
    pub fn new(state: State) -> Self {
        Self {
            turn: Mutex::new(()),
            state: RwLock::new(state),
            readers_waiting: AtomicU32::new(0),
            writer_is_starved: AtomicBool::new(false),
        }
    }

    /// Wait for a turn, and take it: other writers wait until it is dropped.
    pub fn turn(&self) -> Turn<'_> {
        self.begin(self.turn.lock())
    }

    fn begin<'a>(&'a self, turn: MutexGuard<'a, ()>) -> Turn<'a> {
        Turn { index: self, state: None, changed: 0, stream: None, _turn: turn }
    }

    fn lock(&self) -> RwLockWriteGuard<'_, State> {
        if let Some(state) = self.state.try_write_for(PATIENCE) {
            return state;
        }
        self.writer_is_starved.store(true, SeqCst);
        let state = self.state.write();
        self.writer_is_starved.store(false, SeqCst);
        state
    }

    /// Read the state. Nobody writes meanwhile, so keep it short.
    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        if self.writer_is_starved.load(SeqCst) {
            return self.state.read();
        }
        if let Some(state) = self.state.try_read_recursive() {
            return state;
        }
        self.readers_waiting.fetch_add(1, SeqCst);
        let state = self.wait_to_read();
        self.readers_waiting.fetch_sub(1, SeqCst);
        state
    }

    fn wait_to_read(&self) -> RwLockReadGuard<'_, State> {
        for _ in 0..2000 {
            spin_loop();
            if let Some(state) = self.state.try_read_recursive() {
                return state;
            }
        }
        self.state.read_recursive()
    }

    // -- write path ---------------------------------------------------------------------------------------------------

    /// Apply a batch of a stream's events, in order.
    pub fn apply(&self, name: &StreamName, batch: &Batch, model: Option<&str>, now_s: f64) -> Result<Report, TooManyStreams> {
        self.turn().apply(name, batch, model, now_s)
    }

    /// Note that a stream will soon hold `keys`.
    pub fn promise(&self, name: &StreamName, keys: &[BlockKey], end_s: f64) {
        let mut turn = self.turn();
        let name = Arc::new(name.clone());
        for keys in keys.chunks(STEP_BLOCKS) {
            turn.state().promise(&name, keys, end_s);
            turn.pause();
        }
    }

    /// Say why a stream's entries may be wrong, or that they are right.
    pub fn mark(&self, name: &StreamName, stale: Option<u8>) -> Result<(), TooManyStreams> {
        let mut turn = self.turn();
        let state = turn.state();
        let id = state.stream_id(name).ok_or(TooManyStreams)?;
        state.stream_mut(id).stale = stale;
        Ok(())
    }

    /// Drop all that a stream holds; it stays known, unless it is to be forgotten. Returns the entries dropped.
    pub fn drop_stream(&self, name: &StreamName, forget: bool) -> usize {
        let mut turn = self.turn();
        let Some(id) = turn.state().find_stream(name) else { return 0 };
        let before = turn.state().shared.blocks.entries;
        for_all_sets(&mut turn, |state, set| state.drop_from_set(id, set));
        let state = turn.state();
        state.renew_stream(id);
        let dropped = before - state.shared.blocks.entries;
        if forget {
            let left = state.forget_stream(id);
            turn.pause();
            drop(left); // outside of the lock: it may be much
        }
        dropped
    }

    /// Evict what is older than the time to live, end promises whose time is up, and clean up. Returns keys evicted.
    pub fn expire(&self, now_s: f64) -> usize {
        let mut turn = self.turn();
        let evicted = expire(&mut turn, now_s);
        while turn.state().wants_sweep() {
            turn.state().sweep(STEP_RECORDS);
            turn.pause();
        }
        evicted
    }

    // -- snapshots ----------------------------------------------------------------------------------------------------

    /// All of the index but its promises, as bytes ([`crate::snapshot`]). Writers wait, readers go on: it holds the writers' turn,
    /// and of the state it takes no more than a reader's share.
    pub fn snapshot(&self, now_s: f64) -> Vec<u8> {
        let _turn = self.turn.lock();
        snapshot::write(&self.read(), now_s)
    }

    /// Become what the index of a snapshot was; ages go on from what they were. Promises stay those of this index. The bounds
    /// on blocks and bytes hold at once, others from the next event on.
    ///
    /// Only where no stream is known. Whatever is wrong with the bytes, the index stays as it was. Readers go on: they see the
    /// empty index until the end. Codes for stale streams are below `stale_codes`.
    pub fn restore(&self, bytes: &[u8], stale_codes: u8, now_s: f64) -> Result<(), SnapshotError> {
        let mut turn = self.turn();
        let (schema, limits) = {
            let state = self.read();
            if state.streams().next().is_some() {
                return Err(SnapshotError::NotEmpty);
            }
            (state.shared.schema.clone(), state.shared.limits)
        };
        let mut restored = snapshot::read(bytes, schema, limits, stale_codes, now_s)?;
        let state = turn.state();
        std::mem::swap(state, &mut restored);
        std::mem::swap(&mut state.shared.promises, &mut restored.shared.promises);
        turn.pause();
        keep_bounds(&mut turn);
        Ok(())
    }

    // -- read path ----------------------------------------------------------------------------------------------------

    /// Find who holds each key, and tell of it by the state it was found in.
    pub fn lookup<T>(&self, keys: &[BlockKey], now_s: f64, tell: impl FnOnce(&State, &Found) -> T) -> T {
        self.settle(now_s);
        let state = self.read();
        let found = find(&state, keys, now_s);
        tell(&state, &found)
    }

    /// Score every candidate for a prompt's keys.
    pub fn score(&self, keys: &[BlockKey], question: &Question, now_s: f64) -> Scores {
        self.lookup(keys, now_s, |state, found| score(state, found, keys.len() as u32, question))
    }

    /// End what is due, if no writer is at work: otherwise it does so, and what is due is passed over.
    fn settle(&self, now_s: f64) {
        if self.read().is_due(now_s)
            && let Some(turn) = self.turn.try_lock()
        {
            expire(&mut self.begin(turn), now_s);
        }
    }

    /// Sizes.
    pub fn stats(&self) -> Stats {
        self.read().stats()
    }
}

impl Turn<'_> {
    /// Let readers in, if enough was changed since they were.
    fn pause_after(&mut self, blocks: usize) {
        self.changed += blocks;
        if self.changed >= STEP_BLOCKS {
            self.pause();
        }
    }

    fn stream_id(&mut self, name: &StreamName) -> Option<StreamId> {
        if let Some((known, id)) = &self.stream
            && known == name
        {
            return Some(*id);
        }
        let id = self.state().stream_id(name)?;
        self.stream = Some((name.clone(), id));
        Some(id)
    }

    /// Apply a batch of a stream's events, in order.
    pub fn apply(
        &mut self,
        name: &StreamName,
        batch: &Batch,
        model: Option<&str>,
        now_s: f64,
    ) -> Result<Report, TooManyStreams> {
        let mut report = Report::default();
        let id = self.stream_id(name).ok_or(TooManyStreams)?;
        self.state().begin_batch(id, model, batch.timestamp_s, now_s);
        for event in &batch.events {
            match event {
                Event::Stored(event) => store(self, id, event, batch, &mut report),
                Event::Removed(event) => {
                    let slots = self.state().slots_in(id, &event.tier, event.group);
                    for hashes in batch.hashes[event.hashes.clone()].chunks(STEP_BLOCKS) {
                        self.state().remove_blocks(id, &slots, hashes, &mut report);
                        self.pause_after(hashes.len());
                    }
                }
                Event::Cleared(tier) => {
                    let tier = tier.clone().unwrap_or_else(crate::events::Tier::gpu);
                    let slots = self.state().slots_in(id, &tier, None);
                    clear(self, id, &slots, &mut report);
                }
            }
            self.state().end_event(id);
        }
        let blocks = report.stored + report.removed;
        finish(self, now_s, blocks);
        Ok(report)
    }
}

fn store(turn: &mut Turn, id: StreamId, event: &Stored, batch: &Batch, report: &mut Report) {
    let hashes = &batch.hashes[event.hashes.clone()];
    let tokens = &batch.tokens[event.tokens.clone()];
    let state = turn.state();
    if let Some(spec) = event.spec {
        state.learn_group(id, event.group, spec);
    }
    let size = event.block_size_tokens.map_or(0, |size| size as usize);
    let by_hash = state.shared.schema.keys_are_hashes();
    if by_hash && size > 0 && size != state.shared.schema.block_size_tokens {
        report.refused += hashes.len() as u64; // a hash of other blocks than prompts are cut into is nobody's key
        return;
    }
    let Some(slot) = state.slot(id, &event.tier, event.group) else {
        report.refused += hashes.len() as u64;
        return;
    };
    let naming = match size {
        _ if by_hash => Naming::Hashes,
        1.. if tokens.len() / size == hashes.len() => Naming::Tokens(size, tokens),
        _ => Naming::Nothing,
    };
    let mut storing = Storing {
        slot,
        naming,
        extras: event.extras.as_deref().filter(|_| !by_hash),
        end: match naming {
            Naming::Tokens(..) => state.chain_start(id, event.parent, event.lora_name.as_deref()),
            _ => None,
        },
        parent: event.parent,
        touched: SmallVec::with_capacity(hashes.len()),
        first_tick: state.take_ticks(hashes.len()),
        is_whole: true,
    };
    for numbers in steps(hashes.len()) {
        let count = numbers.len();
        turn.state().store_blocks(id, &mut storing, hashes, numbers, report);
        turn.pause_after(count);
    }
    if storing.is_whole {
        return;
    }
    let steps: Vec<Range<usize>> = steps(hashes.len()).collect();
    for numbers in steps.into_iter().rev() {
        let count = numbers.len();
        turn.state().touch_stored(id, &storing, hashes, numbers);
        turn.pause_after(count);
    }
    while turn.state().bound_orphans(id, report) {
        turn.pause();
    }
}

fn steps(count: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count).step_by(STEP_BLOCKS).map(move |start| start..count.min(start + STEP_BLOCKS))
}

fn clear(turn: &mut Turn, id: StreamId, slots: &SmallVec<[Slot; 4]>, report: &mut Report) {
    if slots.is_empty() {
        return;
    }
    turn.state().begin_clear(id, slots, report);
    for_all_sets(turn, |state, set| state.clear_set(id, slots, set, report));
}

fn for_all_sets(turn: &mut Turn, mut each: impl FnMut(&mut State, u32)) {
    let numbers = turn.state().shared.blocks.sets.numbers();
    let mut from = crate::sets::FREE + 1;
    while from < numbers {
        let to = numbers.min(from + STEP_SETS);
        let state = turn.state();
        (from..to).for_each(|set| each(state, set));
        from = to;
        turn.pause();
    }
}

fn expire(turn: &mut Turn, now_s: f64) -> usize {
    turn.state().shared.promises.expire(now_s);
    let mut evicted = 0;
    while turn.state().is_due(now_s) {
        find_victims(turn);
        if !turn.state().expire_one(now_s) {
            break;
        }
        evicted += 1;
        turn.pause_after(1);
    }
    evicted
}

/// Make sure that the next key to evict is known. The look at all records is a reader's: others read meanwhile.
fn find_victims(turn: &mut Turn) {
    if turn.state().knows_oldest() {
        return;
    }
    turn.state = None;
    let found = Victims::of(&turn.index.read().shared.blocks);
    turn.state().victims = found;
}

/// After a batch: keep the bounds, clean up a share, in proportion to what was done.
fn finish(turn: &mut Turn, now_s: f64, blocks: u64) {
    if turn.state().is_due(now_s) {
        expire(turn, now_s);
    }
    keep_bounds(turn);
    let mut looked_at = 0;
    while looked_at < 8 * blocks + 64 && turn.state().wants_sweep() {
        turn.state().sweep(STEP_RECORDS);
        looked_at += u64::from(STEP_RECORDS);
        turn.pause();
    }
    turn.state().shared.blocks.sets.tidy();
}

/// Evict what is beyond the bounds on blocks and bytes.
fn keep_bounds(turn: &mut Turn) {
    while turn.state().shared.blocks.held > turn.state().shared.limits.blocks_max {
        find_victims(turn);
        let Some(oldest) = turn.state().oldest() else { break };
        turn.state().evict(oldest, 1);
        turn.pause_after(1);
    }
    let bytes_max = turn.state().shared.limits.bytes_max;
    while turn.state().bytes() > bytes_max {
        free_dead(turn, 64);
        turn.state().shared.blocks.sets.tidy_closely(); // what is given up leaves sets that no record means
        if turn.state().bytes() <= bytes_max {
            break;
        }
        find_victims(turn);
        if !turn.state().give_up_something() {
            free_dead(turn, usize::MAX);
            turn.state().shared.blocks.sets.tidy_all();
            break;
        }
        turn.pause();
    }
}

/// Free dead records if there are any, and at least one in `share` is dead.
fn free_dead(turn: &mut Turn, share: usize) {
    let blocks = &turn.state().shared.blocks;
    if blocks.dead() == 0 || blocks.dead() < blocks.allocated() / share {
        return;
    }
    loop {
        turn.state().sweep(STEP_RECORDS);
        if !turn.state().is_sweeping() {
            break;
        }
        turn.pause();
    }
}
