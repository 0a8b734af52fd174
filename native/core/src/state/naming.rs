//! Naming: an engine block gets its keys, and so do all that waited for it.

use super::store::End;
use crate::blocks::Link;
use crate::events::{EngineHash, Extra};
use crate::keys::ChainEnd;
use crate::report::Report;
use crate::sets::Op;
use crate::shared::Shared;
use crate::slots::retired;
use crate::stream::Stream;
use smallvec::SmallVec;

/// Give a block its keys, then every orphan that waited for it, and for those, and so on. Returns where its chain stands.
pub(super) fn name(
    shared: &mut Shared,
    stream: &mut Stream,
    hash: EngineHash,
    end: End,
    tokens: &[u32],
    extras: &[Extra],
    report: &mut Report,
) -> End {
    let first = name_one(shared, stream, hash, end, tokens, extras, report);
    let mut todo = waiting_for(stream, hash, &first);
    while let Some(next) = todo.pop() {
        let after = name_one(shared, stream, next.hash, next.end, &next.tokens, &next.extras, report);
        todo.extend(waiting_for(stream, next.hash, &after));
    }
    first
}

struct Waiting {
    hash: EngineHash,
    end: End,
    tokens: Box<[u32]>,
    extras: Box<[Extra]>,
}

fn waiting_for(stream: &mut Stream, parent: EngineHash, end: &End) -> Vec<Waiting> {
    let mut found = Vec::new();
    for hash in stream.children.remove(&parent).unwrap_or_default() {
        if let Some(orphan) = stream.orphans.get_mut(&hash)
            && let Some(tokens) = orphan.tokens.take()
        {
            found.push(Waiting { hash, end: end.clone(), tokens, extras: std::mem::take(&mut orphan.extras) });
        }
    }
    found
}

fn name_one(
    shared: &mut Shared,
    stream: &mut Stream,
    hash: EngineHash,
    end: End,
    tokens: &[u32],
    extras: &[Extra],
    report: &mut Report,
) -> End {
    let mut copies = SmallVec::new();
    if let Some(orphan) = stream.orphans.remove(&hash) {
        report.adopted += 1;
        shared.orphans -= 1;
        stream.orphans_resident -= u64::from(!orphan.copies.is_empty());
        if let Some(parent) = orphan.parent {
            stream.stop_waiting(parent, hash);
        }
        copies = orphan.copies;
    }
    let (before, unfinished) = match end {
        End::Whole(key) => (ChainEnd::at(key), Vec::new()),
        End::Within(end, unfinished) => (end, unfinished),
    };
    let mut keys = Vec::new();
    let after = shared.schema.extend(&before, tokens, extras, &mut keys);
    let is_regular = before.pending.is_empty() && tokens.len() == shared.schema.block_size_tokens;
    if !is_regular {
        let is_held = !copies.is_empty();
        let left = stream.irregular.name(shared, &stream.name, hash, after.clone(), &unfinished, &keys, copies);
        if !is_held {
            stream.irregular.retire(hash, stream.young);
            stream.retired[stream.young as usize] += 1;
        }
        return End::of(&after, &left);
    }
    let (Link::Linked(record) | Link::Known(record)) = shared.blocks.link(hash, after.key, stream.id) else {
        report.refused += 1;
        stream.held -= u64::from(!copies.is_empty());
        return End::Whole(after.key);
    };
    for (slot, count) in &copies {
        shared.blocks.change(record, Op::Add(*slot, *count));
        let primary = shared.blocks.primary(record);
        shared.held_more(&stream.name, primary, after.key);
    }
    if copies.is_empty() {
        shared.blocks.change(record, Op::Retire(retired(stream.id, stream.young)));
        stream.retired[stream.young as usize] += 1;
    }
    End::Whole(after.key)
}
