//! The index to bytes.

use super::OTHER_MODE;
use super::bytes::{Put, seal};
use crate::blocks::Blocks;
use crate::events::{EngineHash, Extra};
use crate::keys::Mode;
use crate::recency::Tick;
use crate::sets::{EMPTY_KEY, EMPTY_NAME, FREE, Kind, SetId};
use crate::slots::{RETIRED, Slot, copies_in, is_held, place_of, slot_in};
use crate::state::State;
use crate::stream::{Orphan, Stream};
use crate::table::RecordId;
use hashbrown::HashMap;

/// Bytes that are made room for beyond those of records.
const ROOM_BYTES: usize = 1 << 16;

/// All of the index. Nobody may write to it meanwhile; readers may go on.
pub(crate) fn write(state: &State, now_s: f64) -> Vec<u8> {
    let blocks = &state.shared.blocks;
    let mut out = Vec::with_capacity(blocks.allocated() * 17 + ROOM_BYTES);
    let schema = &state.shared.schema;
    let is_other_mode = schema.mode != Mode::Kvatlas;
    out.header(if is_other_mode { OTHER_MODE } else { 0 });
    out.count(schema.block_size_tokens);
    out.text(schema.seed.as_bytes());
    if is_other_mode {
        out.text(schema.mode.name().as_bytes());
    }
    out.count(state.tiers.names().len());
    state.tiers.names().iter().for_each(|tier| out.text(tier.0.as_bytes()));
    state.evicted.iter().for_each(|count| out.varint(*count));
    out.count(state.streams.len());
    for stream in &state.streams {
        out.maybe(stream.as_deref(), put_stream);
    }
    out.count(state.free.len());
    state.free.iter().for_each(|id| out.varint(u64::from(*id)));
    let numbers = put_sets(&mut out, blocks);
    let tick = put_records(&mut out, blocks, &numbers);
    let (last, ages_s) = state.shared.recency.ages_s(now_s);
    out.varint(last.max(tick));
    out.count(ages_s.len());
    let mut before = 0;
    for (tick, age_s) in ages_s {
        out.varint(tick - before);
        out.u64(age_s.to_bits());
        before = tick;
    }
    seal(out)
}

// -- streams ----------------------------------------------------------------------------------------------------------

fn put_stream(out: &mut Vec<u8>, stream: &Stream) {
    out.text(stream.name.pod.as_bytes());
    out.varint(u64::from(stream.name.dp_rank));
    out.maybe(stream.model.as_deref(), |out, model| out.text(model.as_bytes()));
    out.maybe(stream.stale, Vec::push);
    out.maybe(stream.last_event_s, |out, at_s| out.u64(at_s.to_bits()));
    out.push(stream.young as u8);
    out.count(stream.groups.len());
    for (group, spec) in &stream.groups {
        out.varint(u64::from(*group));
        out.push(spec.kind as u8);
        out.maybe(spec.window_tokens, Put::varint);
        out.maybe(spec.block_size_tokens, |out, size| out.varint(u64::from(size)));
    }
    out.count(stream.places.len());
    for (tier, group) in &stream.places {
        out.varint(u64::from(*tier));
        out.varint(u64::from(*group));
    }
    put_orphans(out, stream);
    put_irregular(out, stream);
}

fn put_orphans(out: &mut Vec<u8>, stream: &Stream) {
    out.count(stream.orphans.len());
    for (hash, orphan) in &stream.orphans {
        out.u64(*hash);
        out.maybe(orphan.parent, Put::u64);
        out.maybe(orphan.tokens.as_deref(), put_tokens);
        put_extras(out, &orphan.extras);
        put_copies(out, &orphan.copies);
    }
    let numbers: HashMap<EngineHash, (usize, &Orphan)> =
        stream.orphans.iter().enumerate().map(|(number, (hash, orphan))| (*hash, (number, orphan))).collect();
    let waiting = stream.children.iter().map(|(parent, children)| {
        let waits = |child| numbers.get(child).filter(|(_, orphan)| orphan.parent == Some(*parent));
        (*parent, children.iter().filter_map(waits).map(|(number, _)| *number).collect::<Vec<_>>())
    });
    let waiting: Vec<_> = waiting.filter(|(_, children)| !children.is_empty()).collect();
    out.count(waiting.len());
    for (parent, children) in waiting {
        out.u64(parent);
        put_numbers(out, children);
    }
}

fn put_irregular(out: &mut Vec<u8>, stream: &Stream) {
    let irregular = &stream.irregular;
    out.count(irregular.blocks.len());
    for (hash, block) in &irregular.blocks {
        out.u64(*hash);
        out.u64(block.end.key);
        put_tokens(out, &block.end.pending);
        put_extras(out, &block.end.extras);
        out.count(block.unfinished.len());
        block.unfinished.iter().for_each(|hash| out.u64(*hash));
        put_copies(out, &block.copies);
        if block.copies.is_empty() {
            out.push(block.retired.unwrap_or(stream.young) as u8);
        }
    }
    let block_numbers: HashMap<EngineHash, usize> =
        irregular.blocks.keys().enumerate().map(|(number, hash)| (*hash, number)).collect();
    let known = |id: &u32| irregular.chunks[*id as usize].as_ref().map(|chunk| (*id, chunk));
    let chunks: Vec<_> = irregular.by_key.values().flatten().filter_map(known).collect();
    out.count(chunks.len());
    for (_, chunk) in &chunks {
        out.u64(chunk.key);
        put_numbers(out, chunk.hashes.iter().map(|hash| block_numbers[hash]).collect());
    }
    let chunk_numbers: HashMap<u32, usize> = chunks.iter().enumerate().map(|(number, (id, _))| (*id, number)).collect();
    for block in irregular.blocks.values() {
        put_numbers(out, block.chunks.iter().map(|id| chunk_numbers[id]).collect());
    }
}

fn put_numbers(out: &mut Vec<u8>, numbers: Vec<usize>) {
    out.count(numbers.len());
    numbers.into_iter().for_each(|number| out.count(number));
}

fn put_tokens(out: &mut Vec<u8>, tokens: &[u32]) {
    out.count(tokens.len());
    tokens.iter().for_each(|token| out.varint(u64::from(*token)));
}

fn put_extras(out: &mut Vec<u8>, extras: &[Extra]) {
    out.count(extras.len());
    for extra in extras {
        out.zigzag(extra.offset_tokens);
        out.text(extra.kind.as_bytes());
        out.text(&extra.value);
    }
}

fn put_copies(out: &mut Vec<u8>, copies: &[(Slot, u32)]) {
    let mut copies = copies.to_vec();
    copies.sort_unstable();
    out.count(copies.len());
    for (slot, count) in copies {
        out.varint(u64::from(place_of(slot) - RETIRED));
        out.varint(u64::from(count));
    }
}

// -- records ----------------------------------------------------------------------------------------------------------

/// The sets that records mean, but those of Keys. Returns their numbers in the snapshot by their numbers here.
fn put_sets(out: &mut Vec<u8>, blocks: &Blocks) -> Vec<u32> {
    let sets = &blocks.sets;
    let mut numbers = vec![0; sets.numbers() as usize];
    let is_used = |set: &SetId| sets.resolve(*set) == *set && sets.refs(*set) > 0 && sets.kind(*set) != Kind::Key;
    let used: Vec<SetId> = (FREE + 1..sets.numbers()).filter(is_used).collect();
    out.count(used.len());
    for (number, set) in used.into_iter().enumerate() {
        numbers[set as usize] = number as u32;
        out.push(u8::from(sets.kind(set) == Kind::Name));
        out.count(sets.items(set).len());
        let mut before = 0;
        for item in sets.items(set) {
            out.varint(u64::from(slot_in(*item) - before));
            before = slot_in(*item);
            if is_held(*item) {
                out.varint(u64::from(copies_in(*item)));
            }
        }
    }
    numbers
}

/// Returns the latest tick.
fn put_records(out: &mut Vec<u8>, blocks: &Blocks, numbers: &[u32]) -> Tick {
    let counts = out.len();
    out.extend_from_slice(&[0; 24]);
    let mut ticks = Ticks::default();
    let mut written = [0u64; 3];
    let mut keys: Vec<RecordId> = Vec::new();
    let mut from = 1;
    while from < blocks.numbers() {
        let set = blocks.set(from);
        if set <= FREE && set != EMPTY_KEY || blocks.sets.kind(set) != Kind::Block {
            if set != FREE && blocks.sets.kind(set) == Kind::Key {
                keys.push(from);
            }
            from += 1;
            continue;
        }
        let first = blocks.stamp_of(from);
        let mut to = from + 1;
        let goes_on = |to, tick: Tick| blocks.set(to) == set && blocks.stamp_of(to) == tick;
        while to < blocks.numbers() && first.checked_sub(u64::from(to - from)).is_some_and(|tick| goes_on(to, tick)) {
            to += 1;
        }
        out.varint(u64::from(numbers[set as usize]));
        out.varint(u64::from(to - from));
        ticks.put(out, first, u64::from(to - from));
        for id in from..to {
            out.u64(blocks.key_of_primary(id));
            out.u64(blocks.hash(id));
        }
        written[0] += u64::from(to - from);
        from = to;
    }
    let is_live = |name: &RecordId| blocks.set(*name) != EMPTY_NAME;
    keys.retain(|id| blocks.set(*id) != EMPTY_KEY || blocks.names(*id).any(|name| is_live(&name)));
    for id in &keys {
        out.u64(blocks.key_of_primary(*id));
        ticks.put(out, blocks.stamp_of(*id), 1);
        let names = blocks.names(*id).filter(is_live).count();
        out.count(names);
        written[1] += 1;
        written[2] += names as u64;
    }
    for name in keys.iter().flat_map(|id| blocks.names(*id)).filter(is_live) {
        out.u64(blocks.hash(name));
        out.varint(u64::from(numbers[blocks.set(name) as usize]));
    }
    for (count, bytes) in written.iter().zip(out[counts..counts + 24].chunks_exact_mut(8)) {
        bytes.copy_from_slice(&count.to_le_bytes());
    }
    ticks.latest
}

/// Ticks, as differences.
#[derive(Default)]
struct Ticks {
    expected: Tick,
    latest: Tick,
}

impl Ticks {
    fn put(&mut self, out: &mut Vec<u8>, first: Tick, count: u64) {
        out.zigzag(first.wrapping_sub(self.expected) as i64);
        self.expected = first.wrapping_sub(count);
        self.latest = self.latest.max(first);
    }
}
