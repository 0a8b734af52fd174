//! Engine blocks that are not one index block each: larger or smaller ones, or such that begin in the middle of one.
//!
//! A *chunk* is one way to have a block key: all of its engine hashes held together. Copies of the key are those of its scarcest
//! part. As `kvatlas.index.cache`, whose general form this is; blocks of the usual kind live in [`crate::blocks`].

use crate::events::EngineHash;
use crate::keys::{BlockKey, ChainEnd};
use crate::promises::StreamName;
use crate::shared::Shared;
use crate::slots::Slot;
use hashbrown::HashMap;
use hashlink::LinkedHashMap;
use smallvec::SmallVec;

#[cfg(any(test, fuzzing))]
mod check;

type ChunkId = u32;

pub(crate) struct Chunk {
    pub key: BlockKey,
    pub hashes: SmallVec<[EngineHash; 4]>,
}

/// A block whose tokens are known.
pub struct IrregularBlock {
    /// Where its chain stands after it.
    pub end: ChainEnd,
    /// The engine blocks that hold `end.pending`.
    pub unfinished: Vec<EngineHash>,
    pub(crate) chunks: SmallVec<[ChunkId; 4]>,
    pub(crate) copies: SmallVec<[(Slot, u32); 1]>,
    pub(crate) retired: Option<u32>,
}

/// What [`Irregular::set_copies`] changed.
#[derive(Default)]
pub struct Shift {
    /// It had copies in the slot.
    pub had_copies: bool,
    /// It had copies in any slot.
    pub held_before: bool,
    /// It has copies now.
    pub held_after: bool,
    /// The generation it was retired in.
    pub retired_before: Option<u32>,
}

/// A stream's irregular blocks.
#[derive(Default)]
pub struct Irregular {
    pub(crate) blocks: LinkedHashMap<EngineHash, IrregularBlock>,
    pub(crate) chunks: Vec<Option<Chunk>>,
    free: Vec<ChunkId>,
    pub(crate) by_key: HashMap<BlockKey, SmallVec<[ChunkId; 1]>>,
    pub(crate) retired: [Vec<EngineHash>; 2],
}

impl Irregular {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// A block.
    pub fn get(&self, hash: EngineHash) -> Option<&IrregularBlock> {
        self.blocks.get(&hash)
    }

    /// The oldest block.
    pub fn oldest(&self) -> Option<EngineHash> {
        self.blocks.front().map(|(hash, _)| *hash)
    }

    /// All keys that its blocks make up.
    pub fn keys(&self) -> impl Iterator<Item = BlockKey> {
        self.by_key.keys().copied()
    }

    /// The copies of each key that its blocks make up, for each way in which they do.
    pub fn key_copies(&self) -> impl Iterator<Item = (BlockKey, Vec<(Slot, u32)>)> {
        self.chunks.iter().flatten().map(|chunk| (chunk.key, self.copies_by_slot(chunk)))
    }

    /// All hashes.
    pub fn hashes(&self) -> Vec<EngineHash> {
        self.blocks.keys().copied().collect()
    }

    /// A block's copies.
    pub fn copies(&self, hash: EngineHash) -> SmallVec<[(Slot, u32); 1]> {
        self.blocks.get(&hash).map(|block| block.copies.clone()).unwrap_or_default()
    }

    /// The keys that a block is part of, in order.
    pub fn keys_of(&self, hash: EngineHash) -> SmallVec<[BlockKey; 4]> {
        let chunks = self.blocks.get(&hash).map(|block| &block.chunks[..]).unwrap_or_default();
        chunks.iter().filter_map(|id| self.chunks[*id as usize].as_ref()).map(|chunk| chunk.key).collect()
    }

    /// Name a block: `keys` end in it, the first one also needs the blocks `before` it.
    #[expect(clippy::too_many_arguments, reason = "each is a part of what an event says of the block")]
    pub fn name(
        &mut self,
        shared: &mut Shared,
        stream: &StreamName,
        hash: EngineHash,
        end: ChainEnd,
        before: &[EngineHash],
        keys: &[BlockKey],
        copies: SmallVec<[(Slot, u32); 1]>,
    ) -> Vec<EngineHash> {
        let mut parts: SmallVec<[EngineHash; 4]> = before.iter().copied().collect();
        parts.push(hash);
        let unfinished = match (keys, end.pending.is_empty()) {
            ([], _) => parts.to_vec(),
            (_, false) => vec![hash],
            (_, true) => Vec::new(),
        };
        let block = IrregularBlock { end, unfinished: unfinished.clone(), chunks: SmallVec::new(), copies, retired: None };
        self.blocks.insert(hash, block);
        shared.irregular += 1;
        for (number, key) in keys.iter().enumerate() {
            let hashes = if number == 0 { parts.clone() } else { SmallVec::from_slice(&[hash]) };
            self.add_chunk(shared, stream, Chunk { key: *key, hashes });
        }
        unfinished
    }

    fn add_chunk(&mut self, shared: &mut Shared, stream: &StreamName, chunk: Chunk) {
        if !self.has_parts(&chunk) {
            return; // the key can't be followed
        }
        let slots: SmallVec<[(Slot, u32); 4]> = self.copies_by_slot(&chunk).into_iter().collect();
        let key = chunk.key;
        let id = self.free.pop().unwrap_or_else(|| {
            self.chunks.push(None);
            self.chunks.len() as ChunkId - 1
        });
        for part in &chunk.hashes {
            if let Some(block) = self.blocks.get_mut(part) {
                block.chunks.push(id);
            }
        }
        self.by_key.entry(key).or_default().push(id);
        self.chunks[id as usize] = Some(chunk);
        for (slot, copies) in slots {
            shared.hold(stream, slot, key, i64::from(copies));
        }
    }

    /// Whether a chunk's parts are still what they were: none given up since, or named anew, or named twice.
    fn has_parts(&self, chunk: &Chunk) -> bool {
        let last = chunk.hashes.len() - 1;
        chunk.hashes.iter().enumerate().all(|(number, part)| {
            let is_known = self.blocks.get(part).is_some_and(|block| number == last || !block.end.pending.is_empty());
            is_known && !chunk.hashes[..number].contains(part)
        })
    }

    fn copies_by_slot(&self, chunk: &Chunk) -> Vec<(Slot, u32)> {
        let first = self.blocks.get(&chunk.hashes[0]).map(|block| &block.copies[..]).unwrap_or_default();
        let all = first.iter().map(|(slot, _)| (*slot, self.copies_of(*slot, chunk)));
        all.filter(|(_, copies)| *copies > 0).collect()
    }

    fn copies_of(&self, slot: Slot, chunk: &Chunk) -> u32 {
        chunk.hashes.iter().map(|part| self.copies_in(*part, slot)).min().unwrap_or(0)
    }

    /// A block's copies in a slot.
    pub fn copies_in(&self, hash: EngineHash, slot: Slot) -> u32 {
        let copies = self.blocks.get(&hash).map(|block| &block.copies[..]).unwrap_or_default();
        copies.iter().find(|(other, _)| *other == slot).map_or(0, |(_, count)| *count)
    }

    /// Set how many copies of a known block a slot has, and carry the change over to its keys.
    pub fn set_copies(&mut self, shared: &mut Shared, stream: &StreamName, hash: EngineHash, slot: Slot, count: u32) -> Shift {
        let Some(block) = self.blocks.get(&hash) else { return Shift::default() };
        let ids = block.chunks.clone();
        let chunks = || ids.iter().filter_map(|id| self.chunks[*id as usize].as_ref());
        let before: SmallVec<[(BlockKey, u32); 4]> = chunks().map(|chunk| (chunk.key, self.copies_of(slot, chunk))).collect();
        let Some(block) = self.blocks.get_mut(&hash) else { return Shift::default() };
        let held_before = !block.copies.is_empty();
        let at = block.copies.iter().position(|(other, _)| *other == slot);
        match (at, count) {
            (Some(at), 0) => {
                block.copies.remove(at);
            }
            (Some(at), _) => block.copies[at].1 = count,
            (None, 0) => {}
            (None, _) => block.copies.push((slot, count)),
        }
        let held_after = !block.copies.is_empty();
        let retired_before = if held_after { block.retired.take() } else { None };
        let chunks = || ids.iter().filter_map(|id| self.chunks[*id as usize].as_ref());
        let after: SmallVec<[u32; 4]> = chunks().map(|chunk| self.copies_of(slot, chunk)).collect();
        for ((key, had), has) in before.into_iter().zip(after) {
            shared.hold(stream, slot, key, i64::from(has) - i64::from(had));
        }
        Shift { had_copies: at.is_some(), held_before, held_after, retired_before }
    }

    /// Remember a block that is held nowhere.
    pub fn retire(&mut self, hash: EngineHash, generation: u32) {
        if let Some(block) = self.blocks.get_mut(&hash) {
            block.retired = Some(generation);
            self.retired[generation as usize].push(hash);
        }
        let listed = &mut self.retired[generation as usize];
        if listed.len() > 2 * self.blocks.len() + 64 {
            listed.sort_unstable();
            listed.dedup();
            listed.retain(|hash| self.blocks.get(hash).is_some_and(|block| block.retired == Some(generation)));
        }
    }

    /// Forget the blocks of a generation.
    pub fn forget_retired(&mut self, shared: &mut Shared, stream: &StreamName, generation: u32) {
        for hash in std::mem::take(&mut self.retired[generation as usize]) {
            if self.blocks.get(&hash).is_some_and(|block| block.retired == Some(generation)) {
                self.drop_block(shared, stream, hash);
            }
        }
    }

    /// Forget a block: its copies, its keys, and that it ever was. Returns whether it was held, and how it was retired.
    pub fn drop_block(&mut self, shared: &mut Shared, stream: &StreamName, hash: EngineHash) -> (bool, Option<u32>) {
        let copies = self.copies(hash);
        for (slot, _) in &copies {
            self.set_copies(shared, stream, hash, *slot, 0);
        }
        let Some(block) = self.blocks.get(&hash) else { return (false, None) };
        let (chunks, retired) = (block.chunks.clone(), block.retired);
        for id in chunks {
            self.drop_chunk(shared, stream, id);
        }
        self.blocks.remove(&hash);
        shared.irregular -= 1;
        (!copies.is_empty(), retired)
    }

    fn drop_chunk(&mut self, shared: &mut Shared, stream: &StreamName, id: ChunkId) {
        let Some(chunk) = self.chunks[id as usize].take() else { return };
        for (slot, copies) in self.copies_by_slot(&chunk) {
            shared.hold(stream, slot, chunk.key, -i64::from(copies));
        }
        for part in &chunk.hashes {
            if let Some(block) = self.blocks.get_mut(part) {
                block.chunks.retain(|other| *other != id);
            }
        }
        if let Some(left) = self.by_key.get_mut(&chunk.key) {
            left.retain(|other| *other != id);
            if left.is_empty() {
                self.by_key.remove(&chunk.key);
            }
        }
        self.free.push(id);
    }

    /// Give up a key, and the blocks that make up nothing else. Returns (held, retired generation) of each of those.
    pub fn evict(&mut self, shared: &mut Shared, stream: &StreamName, key: BlockKey) -> Vec<(bool, Option<u32>)> {
        let mut gone = Vec::new();
        for id in self.by_key.get(&key).cloned().unwrap_or_default() {
            let Some(chunk) = &self.chunks[id as usize] else { continue };
            let parts = chunk.hashes.clone();
            self.drop_chunk(shared, stream, id);
            for part in parts {
                if self.blocks.get(&part).is_some_and(|block| block.chunks.is_empty()) {
                    gone.push(self.drop_block(shared, stream, part));
                }
            }
        }
        gone
    }
}
