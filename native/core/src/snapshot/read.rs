//! Bytes to an index.

use super::bytes::{Read, Reader};
use super::{OTHER_MODE, SnapshotError};
use crate::blocks::Refused;
use crate::events::{AttentionKind, EngineHash, Extra, GroupSpec, Tier};
use crate::irregular::{Chunk, Irregular, IrregularBlock};
use crate::keys::{ChainEnd, KeySchema, Mode};
use crate::promises::StreamName;
use crate::recency::Tick;
use crate::report::Limits;
use crate::sets::{FREE, Kind, Op, SetId};
use crate::slots::{Item, PLACES_MAX, RETIRED, STREAMS_MAX, Slot, StreamId, is_held, item, place_of, slot, slot_in, stream_of};
use crate::state::State;
use crate::stream::{Orphan, Stream, TierId};
use crate::table::{Place, RecordId};
use smallvec::SmallVec;
use std::sync::Arc;

/// Records whose places are looked up together.
const TOGETHER: usize = 32;
/// No tick comes near.
const TICK_MAX: Tick = 1 << 60;
const KINDS: [AttentionKind; 4] =
    [AttentionKind::Full, AttentionKind::SlidingWindow, AttentionKind::State, AttentionKind::Ignored];

/// A new index from a snapshot. Codes for stale streams are below `stale_codes`.
pub(crate) fn read(
    snapshot: &[u8],
    schema: KeySchema,
    limits: Limits,
    stale_codes: u8,
    now_s: f64,
) -> Result<State, SnapshotError> {
    let mut from = Reader::open(snapshot)?;
    check_schema(&mut from, &schema)?;
    let mut state = State::new(schema, limits);
    read_tiers(&mut from, &mut state)?;
    for count in &mut state.evicted {
        *count = from.varint()?;
    }
    read_streams(&mut from, &mut state, stale_codes)?;
    let sets = read_sets(&mut from, &mut state)?;
    let latest = read_records(&mut from, &mut state, &sets)?;
    read_use(&mut from, &state, latest, now_s)?;
    from.end()?;
    count_blocks(&mut state);
    Ok(state)
}

fn check_schema(from: &mut Reader, ours: &KeySchema) -> Read<()> {
    let size = from.varint()?;
    let seed = from.text()?;
    let mode = if from.flags == OTHER_MODE { from.text()?.to_owned() } else { Mode::Kvatlas.name() };
    let differs = |field, theirs: String, ours: String| Err(SnapshotError::Schema { field, theirs, ours });
    if size != ours.block_size_tokens as u64 {
        return differs("block_size_tokens", size.to_string(), ours.block_size_tokens.to_string());
    }
    if mode != ours.mode.name() {
        return differs("mode", mode, ours.mode.name());
    }
    if *seed != *ours.seed {
        return differs("seed", format!("{seed:?}"), format!("{:?}", ours.seed));
    }
    Ok(())
}

fn read_tiers(from: &mut Reader, state: &mut State) -> Read<()> {
    let count = from.count(1)?;
    from.check(count <= PLACES_MAX, "too many tiers")?;
    for number in 0..count {
        let tier = Tier::named(from.text()?);
        from.check(state.tiers.number(&tier) == Some(number as TierId), "a tier that was named before")?;
    }
    Ok(())
}

// -- streams ----------------------------------------------------------------------------------------------------------

fn read_streams(from: &mut Reader, state: &mut State, stale_codes: u8) -> Read<()> {
    let count = from.count(1)?;
    from.check(count <= STREAMS_MAX, "too many streams")?;
    let tiers = state.tiers.names().len();
    for id in 0..count as StreamId {
        let schema = &state.shared.schema;
        let stream = from.maybe(|from| read_stream(from, id, tiers, schema, stale_codes))?;
        if let Some(stream) = &stream {
            let known = state.by_name.insert(stream.name.clone(), id);
            from.check(known.is_none(), "a stream that was named before")?;
            state.shared.orphans += stream.orphans.len();
            state.shared.irregular += stream.irregular.len();
        }
        state.streams.push(stream.map(Box::new));
    }
    state.free = from.list(1, |from| Ok(from.below(count, "a free number beyond all")? as StreamId))?;
    let mut is_free = vec![false; count];
    for id in &state.free {
        let known = std::mem::replace(&mut is_free[*id as usize], true);
        from.check(!known && state.streams[*id as usize].is_none(), "a free number that is none")?;
    }
    from.check(state.free.len() + state.by_name.len() == count, "a number that is neither free nor a stream's")
}

fn read_stream(from: &mut Reader, id: StreamId, tiers: usize, schema: &KeySchema, stale_codes: u8) -> Read<Stream> {
    let name = StreamName { pod: from.text()?.into(), dp_rank: from.u32()? };
    let mut stream = Stream::new(id, Arc::new(name));
    stream.model = from.maybe(Reader::text)?.map(Into::into);
    stream.stale = from.maybe(|from| from.u8_below(stale_codes))?;
    stream.last_event_s = from.maybe(Reader::f64)?;
    from.check(stream.last_event_s.is_none_or(f64::is_finite), "a time that is no number")?;
    stream.young = u32::from(from.u8_below(2)?);
    stream.groups = from.list(4, |from| {
        let group = from.u32()?;
        let kind = KINDS[usize::from(from.u8_below(KINDS.len() as u8)?)];
        let (window_tokens, block_size_tokens) = (from.maybe(Reader::varint)?, from.maybe(Reader::u32)?);
        Ok((group, GroupSpec { kind, window_tokens, block_size_tokens }))
    })?;
    stream.places = from.list(2, |from| Ok((from.below(tiers, "an unknown tier")? as TierId, from.u32()?)))?;
    from.check(stream.places.len() <= PLACES_MAX, "too many places")?;
    read_orphans(from, &mut stream)?;
    read_irregular(from, &mut stream, schema)?;
    Ok(stream)
}

fn read_orphans(from: &mut Reader, stream: &mut Stream) -> Read<()> {
    let orphans = from.list(12, |from| {
        let hash = from.u64()?;
        let parent = from.maybe(Reader::u64)?;
        let tokens = from.maybe(read_tokens)?;
        let extras = read_extras(from)?;
        let copies = read_copies(from, stream)?;
        Ok((hash, Orphan { parent, tokens, extras, copies }))
    })?;
    let parents: Vec<(EngineHash, Option<EngineHash>)> = orphans.iter().map(|(hash, orphan)| (*hash, orphan.parent)).collect();
    for (hash, orphan) in orphans {
        stream.orphans_resident += u64::from(!orphan.copies.is_empty());
        from.check(stream.orphans.insert(hash, orphan).is_none(), "an orphan that was named before")?;
    }
    for _ in 0..from.count(10)? {
        let parent = from.u64()?;
        let children = from.list(1, |from| {
            let (child, waits_for) = parents[from.below(parents.len(), "an unknown orphan")?];
            from.check(waits_for == Some(parent), "an orphan that does not wait for this").map(|()| child)
        })?;
        from.check(stream.children.insert(parent, children.into()).is_none(), "a parent that was named before")?;
    }
    Ok(())
}

fn read_irregular(from: &mut Reader, stream: &mut Stream, schema: &KeySchema) -> Read<()> {
    let (block_size_tokens, mode) = (schema.block_size_tokens, &schema.mode);
    let mut irregular = Irregular::default();
    for _ in 0..from.count(21)? {
        let hash = from.u64()?;
        let end = ChainEnd { key: from.u64()?, pending: read_tokens(from)?, extras: read_extras(from)? };
        let left = end.pending.len();
        from.check(left < block_size_tokens, "more tokens left over than a block has")?;
        let first = if mode.has_earlier_extras() { i64::MIN / 2 } else { 0 };
        let is_left = |extra: &Extra| (first..left as i64).contains(&extra.offset_tokens);
        from.check(end.extras.iter().all(is_left), "an extra beyond the tokens left over")?;
        let unfinished = from.list(8, Reader::u64)?;
        from.check(unfinished.len() <= left, "more blocks than tokens left over")?;
        let copies = read_copies(from, stream)?;
        let mut retired = None;
        if copies.is_empty() {
            let generation = from.u8_below(2)?;
            retired = Some(u32::from(generation));
            irregular.retired[usize::from(generation)].push(hash);
        }
        from.check(!stream.orphans.contains_key(&hash), "an orphan that is none")?;
        let block = IrregularBlock { end, unfinished, chunks: SmallVec::new(), copies, retired };
        from.check(irregular.blocks.insert(hash, block).is_none(), "an irregular block that was named before")?;
    }
    read_chunks(from, &mut irregular, block_size_tokens)?;
    stream.irregular = irregular;
    Ok(())
}

/// What blocks make up, told from both sides.
fn read_chunks(from: &mut Reader, irregular: &mut Irregular, block_size_tokens: usize) -> Read<()> {
    let hashes = irregular.hashes();
    let mut pairs = Vec::new();
    for id in 0..from.count(10)? as u32 {
        let key = from.u64()?;
        let parts = from.list(1, |from| from.below(hashes.len(), "an unknown irregular block"))?;
        from.check((1..=block_size_tokens).contains(&parts.len()), "a key of more blocks than tokens, or of none")?;
        pairs.extend(parts.iter().map(|part| (*part, id)));
        irregular.chunks.push(Some(Chunk { key, hashes: parts.into_iter().map(|part| hashes[part]).collect() }));
        irregular.by_key.entry(key).or_default().push(id);
    }
    let mut others = Vec::new();
    for (number, block) in irregular.blocks.values_mut().enumerate() {
        block.chunks = from.list(1, |from| Ok(from.below(irregular.chunks.len(), "an unknown key")? as u32))?.into();
        others.extend(block.chunks.iter().map(|id| (number, *id)));
    }
    pairs.sort_unstable();
    others.sort_unstable();
    let is_told_once = pairs.windows(2).all(|two| two[0] != two[1]);
    from.check(is_told_once && pairs == others, "keys and their blocks that do not know each other")
}

fn read_tokens(from: &mut Reader) -> Read<Box<[u32]>> {
    from.list(1, Reader::u32).map(Into::into)
}

fn read_extras(from: &mut Reader) -> Read<Box<[Extra]>> {
    let extras = from
        .list(3, |from| Ok(Extra { offset_tokens: from.zigzag()?, kind: from.text()?.into(), value: from.bytes()?.into() }))?;
    Ok(extras.into())
}

fn read_copies(from: &mut Reader, stream: &Stream) -> Read<SmallVec<[(Slot, u32); 1]>> {
    let copies = from.list(2, |from| {
        let place = from.below(stream.places.len(), "an unknown place")? as u32;
        Ok((slot(stream.id, place + RETIRED), read_count(from)?))
    })?;
    from.check(copies.windows(2).all(|two| two[0].0 < two[1].0), "places out of order")?;
    Ok(copies.into())
}

fn read_count(from: &mut Reader) -> Read<u32> {
    let copies = from.u32()?;
    from.check(copies > 0, "no copies").map(|()| copies)
}

// -- records ----------------------------------------------------------------------------------------------------------

/// Returns the sets by their numbers in the snapshot, with their kinds.
fn read_sets(from: &mut Reader, state: &mut State) -> Read<Vec<(SetId, Kind)>> {
    let mut sets = Vec::new();
    for _ in 0..from.count(3)? {
        let kind = if from.u8_below(2)? == 0 { Kind::Block } else { Kind::Name };
        let mut before = None;
        let items = from.list(1, |from| {
            let item = read_item(from, state, before)?;
            before = Some(slot_in(item));
            Ok(item)
        })?;
        from.check(!items.is_empty(), "a set of nothing")?;
        sets.push((state.shared.blocks.sets.intern(kind, &items), kind));
    }
    Ok(sets)
}

fn read_item(from: &mut Reader, state: &State, before: Option<Slot>) -> Read<Item> {
    let step = from.u32()?;
    from.check(step > 0 || before.is_none(), "slots out of order")?;
    let Some(slot) = before.unwrap_or(0).checked_add(step) else { return from.damaged("a slot beyond all") };
    let Some(stream) = state.streams.get(stream_of(slot) as usize).and_then(Option::as_ref) else {
        return from.damaged("a slot of no stream");
    };
    let place = place_of(slot);
    from.check(place < stream.places.len() as u32 + RETIRED, "a slot of no place")?;
    let is_alone = before.is_none_or(|before| stream_of(before) != stream.id || place_of(before) >= RETIRED);
    from.check(is_alone, "a block that is retired and also something else")?;
    Ok(item(slot, if place < RETIRED { 1 } else { read_count(from)? }))
}

/// Returns the latest tick.
fn read_records(from: &mut Reader, state: &mut State, sets: &[(SetId, Kind)]) -> Read<Tick> {
    let (blocks, keys, names) = (from.u64()?, from.u64()?, from.u64()?);
    let (blocks, keys, names) = (from.room_for(blocks, 16)?, from.room_for(keys, 10)?, from.room_for(names, 9)?);
    state.shared.blocks.make_room(blocks + keys, blocks + names);
    let mut ticks = Ticks::default();
    let mut left = blocks;
    while left > 0 {
        let set = read_set(from, sets, Kind::Block)?;
        let count = from.count(16)?;
        from.check((1..=left).contains(&count), "a run of more records than there are, or of none")?;
        let tick = ticks.next(from, count)?;
        read_run(from, state, set, tick, count)?;
        left -= count;
    }
    read_keys(from, state, sets, &mut ticks, keys, names)?;
    Ok(ticks.latest)
}

fn read_set(from: &mut Reader, sets: &[(SetId, Kind)], kind: Kind) -> Read<SetId> {
    let (set, known) = sets[from.below(sets.len(), "an unknown set")?];
    from.check(known == kind, "a set of another kind").map(|()| set)
}

fn read_run(from: &mut Reader, state: &mut State, set: SetId, mut tick: Tick, count: usize) -> Read<()> {
    let blocks = &mut state.shared.blocks;
    let mut left = count;
    while left > 0 {
        let together = left.min(TOGETHER);
        let mut names: SmallVec<[(u64, Place, u64, Place); TOGETHER]> = SmallVec::new();
        for record in from.take(together * 16)?.chunks_exact(16) {
            let (key, hash) = record.split_at(8);
            let name = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let (key, hash) = (name(key), name(hash));
            names.push((key, blocks.place(key), hash, blocks.place(hash)));
        }
        names.iter().for_each(|name| blocks.expect_record(name.1, name.3));
        for (key, key_place, hash, hash_place) in names {
            if let Err(refused) = blocks.restore_block((key, key_place), (hash, hash_place), set, tick) {
                return from.damaged(problem(refused));
            }
            tick = tick.wrapping_sub(1);
        }
        left -= together;
    }
    Ok(())
}

fn problem(refused: Refused) -> &'static str {
    match refused {
        Refused::Full => "more records than there are numbers",
        Refused::Known => "a key that was named before",
    }
}

fn read_keys(
    from: &mut Reader,
    state: &mut State,
    sets: &[(SetId, Kind)],
    ticks: &mut Ticks,
    keys: usize,
    names: usize,
) -> Read<()> {
    let mut left = names as u64;
    let mut known: Vec<(RecordId, u32)> = Vec::with_capacity(keys);
    for _ in 0..keys {
        let key = from.u64()?;
        let tick = ticks.next(from, 1)?;
        let count = from.u32()?;
        from.check(u64::from(count) <= left, "more names than there are")?;
        left -= u64::from(count);
        match state.shared.blocks.restore_key(key, tick) {
            Ok(id) => known.push((id, count)),
            Err(refused) => return from.damaged(problem(refused)),
        }
    }
    from.check(left == 0, "names of no key")?;
    for (id, count) in &known {
        let mut before = None;
        for _ in 0..*count {
            let hash = from.u64()?;
            let set = read_set(from, sets, Kind::Name)?;
            match state.shared.blocks.restore_name(*id, before, hash, set) {
                Ok(name) => before = Some(name),
                Err(refused) => return from.damaged(problem(refused)),
            }
        }
    }
    hold_irregular(from, state)?;
    let blocks = &state.shared.blocks;
    let is_somebodys = |(id, count): &(RecordId, u32)| *count > 0 || blocks.sets.held(blocks.set(*id)) > 0;
    from.check(known.iter().all(is_somebodys), "a key that goes by no name")
}

/// Let Keys have the copies that irregular blocks make up.
fn hold_irregular(from: &Reader, state: &mut State) -> Read<()> {
    let blocks = &mut state.shared.blocks;
    for stream in state.streams.iter().flatten() {
        for (key, copies) in stream.irregular.key_copies() {
            for (slot, count) in copies {
                let Some(id) = blocks.find_key(key).filter(|id| blocks.sets.kind(blocks.set(*id)) == Kind::Key) else {
                    return from.damaged("a key of irregular blocks that is not there");
                };
                blocks.change_primary(id, Op::Add(slot, count));
            }
        }
    }
    Ok(())
}

#[derive(Default)]
struct Ticks {
    expected: Tick,
    latest: Tick,
}

impl Ticks {
    /// The tick of the first of `count` records, each used just before the one before it.
    fn next(&mut self, from: &mut Reader, count: usize) -> Read<Tick> {
        let first = self.expected.wrapping_add(from.zigzag()? as u64);
        from.check(first <= TICK_MAX && count as u64 - 1 <= first, "an impossible time of use")?;
        self.expected = first.wrapping_sub(count as u64);
        self.latest = self.latest.max(first);
        Ok(first)
    }
}

fn read_use(from: &mut Reader, state: &State, latest: Tick, now_s: f64) -> Read<()> {
    let last = from.varint()?;
    from.check((latest..=TICK_MAX).contains(&last), "a use after the last one")?;
    let mut before = (0, f64::INFINITY);
    let ages_s = from.list(9, |from| {
        let step = from.varint()?;
        let age_s = from.f64()?;
        from.check(step <= last - before.0, "a time after the last use")?;
        from.check(age_s.is_finite() && age_s >= 0.0 && age_s <= before.1, "ages out of order")?;
        before = (before.0 + step, age_s);
        Ok(before)
    })?;
    from.check(last == 0 || !ages_s.is_empty(), "uses at no time")?;
    state.shared.recency.restore(&ages_s, last, now_s);
    Ok(())
}

/// Count what each stream holds and remembers.
fn count_blocks(state: &mut State) {
    let sets = &state.shared.blocks.sets;
    let mut count = |stream: StreamId, is_held: bool, generation: u32, blocks: u64| {
        if let Some(stream) = &mut state.streams[stream as usize] {
            let counter = if is_held { &mut stream.held } else { &mut stream.retired[generation as usize] };
            *counter += blocks;
        }
    };
    for set in (FREE + 1..sets.numbers()).filter(|set| sets.refs(*set) > 0 && sets.kind(*set) != Kind::Key) {
        let mut before = None;
        for item in sets.items(set) {
            let stream = stream_of(slot_in(*item));
            if before.replace(stream) != Some(stream) {
                count(stream, is_held(*item), place_of(slot_in(*item)), u64::from(sets.refs(set)));
            }
        }
    }
    for stream in state.streams.iter_mut().flatten() {
        stream.held += stream.orphans_resident;
        for block in stream.irregular.blocks.values() {
            match block.retired {
                Some(generation) => stream.retired[generation as usize] += 1,
                None => stream.held += 1,
            }
        }
    }
}
