//! Irregular blocks and their chunks, each looked for from the other side.

use super::*;
use crate::blocks::Copies;

impl Irregular {
    /// Panics where what is maintained differs from a fresh count. Adds the copies of the keys made up here to `keys`.
    pub fn check(&self, keys: &mut std::collections::HashMap<BlockKey, Copies>) {
        let mut listed = 0;
        for (id, chunk) in self.chunks.iter().enumerate() {
            let id = id as ChunkId;
            assert_eq!(chunk.is_none(), self.free.contains(&id), "chunk {id} is free or in use");
            let Some(chunk) = chunk else { continue };
            assert!(self.by_key[&chunk.key].contains(&id));
            for part in &chunk.hashes {
                let block = &self.blocks[part];
                assert_eq!(block.chunks.iter().filter(|other| **other == id).count(), 1, "a block is one part of a chunk");
            }
            listed += chunk.hashes.len();
            for (slot, copies) in self.copies_by_slot(chunk) {
                *keys.entry(chunk.key).or_default().entry(slot).or_default() += u64::from(copies);
            }
        }
        assert_eq!(listed, self.blocks.values().map(|block| block.chunks.len()).sum::<usize>());
        assert_eq!(self.by_key.values().map(SmallVec::len).sum::<usize>(), self.chunks.iter().flatten().count());
        assert!(self.by_key.values().all(|ids| !ids.is_empty()));
        for (hash, block) in &self.blocks {
            assert!(block.copies.iter().all(|(_, copies)| *copies > 0));
            assert_eq!(block.copies.is_empty(), block.retired.is_some(), "a block is held or remembered");
            if let Some(generation) = block.retired {
                assert!(self.retired[generation as usize].contains(hash), "a retired block is listed");
            }
        }
    }

    /// (blocks held, blocks retired by generation)
    pub fn counts(&self) -> (u64, [u64; 2]) {
        let retired = |generation| self.blocks.values().filter(|block| block.retired == Some(generation)).count() as u64;
        (self.blocks.values().filter(|block| !block.copies.is_empty()).count() as u64, [retired(0), retired(1)])
    }

    /// All slots with copies.
    pub fn slots(&self) -> impl Iterator<Item = Slot> {
        self.blocks.values().flat_map(|block| &block.copies).map(|(slot, _)| *slot)
    }
}
