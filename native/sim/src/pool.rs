//! The GPU's blocks. As `kvatlas.sim.blocks.BlockPool`.

use hashbrown::HashTable;

/// A block's number.
pub type Block = u32;

/// The block that nobody gets: it ends lists.
const NONE: Block = 0;

/// What is known of one block: half a cache line.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
struct Record {
    key: u64,
    /// How many times blocks had been named when it was; 0: it has no key.
    named_at: u64,
    users: u32,
    /// The next newer block with the same key.
    newer: Block,
    /// Neighbours in the queue of free blocks.
    before: Block,
    after: Block,
}

impl Record {
    fn is_named(&self) -> bool {
        self.named_at > 0
    }
}

/// Blocks by number, free ones in a queue: the next to be taken is behind block 0, the last before it.
pub struct BlockPool {
    records: Vec<Record>,
    /// The oldest block of each key, found by it.
    found: HashTable<Block>,
    free: usize,
    cached: usize,
    /// How many times blocks were named.
    named: u64,
}

/// What was found for a job's keys.
#[derive(Default)]
pub struct Hits {
    /// The blocks of its leading keys.
    pub blocks: Vec<Block>,
    /// When: how many times blocks had been named.
    at: u64,
}

impl BlockPool {
    /// `blocks` with the one that is never used.
    pub fn new(blocks: u32) -> Self {
        let ring = |block: u32| Record {
            before: if block == 0 { blocks - 1 } else { block - 1 },
            after: if block + 1 == blocks { 0 } else { block + 1 },
            ..Record::default()
        };
        let records = (0..blocks).map(ring).collect();
        Self { records, found: HashTable::with_capacity(blocks as usize), free: blocks as usize - 1, cached: 0, named: 0 }
    }

    /// Blocks that nobody uses.
    pub fn free(&self) -> usize {
        self.free
    }

    /// Blocks that jobs use.
    pub fn used(&self) -> usize {
        self.records.len() - 1 - self.free
    }

    /// Blocks with a key.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Find the blocks of the leading keys that are held, given what was found for any keys before.
    pub fn prefix(&self, keys: &[u64], hits: &mut Hits) {
        let is_still = |(block, key): (&Block, &u64)| {
            let record = &self.records[*block as usize];
            record.is_named() && record.key == *key && record.named_at <= hits.at // it was the oldest with this key, and still is
        };
        let still = hits.blocks.iter().zip(keys).take_while(|&pair| is_still(pair)).count();
        hits.blocks.truncate(still);
        hits.blocks.extend(keys[still..].iter().map_while(|&key| self.find(key)));
        hits.at = self.named;
    }

    /// How many of some blocks nobody uses.
    pub fn unused(&self, blocks: &[Block]) -> usize {
        blocks.iter().filter(|&&block| self.records[block as usize].users == 0).count()
    }

    /// One more job uses these blocks, which have a key.
    pub fn use_named(&mut self, blocks: &[Block]) {
        for &block in blocks {
            if self.records[block as usize].users == 0 {
                self.unlink(block);
            }
            self.records[block as usize].users += 1;
        }
    }

    /// Take so many blocks, of which there are enough, for one job; their keys are lost.
    pub fn take(&mut self, count: usize, taken: &mut Vec<Block>, lost: &mut Vec<u64>) {
        for _ in 0..count {
            let block = self.records[NONE as usize].after;
            assert_ne!(block, NONE, "no block is free");
            self.unlink(block);
            self.records[block as usize].users = 1;
            if self.records[block as usize].is_named() {
                lost.push(self.records[block as usize].key);
                self.forget(block);
            }
            taken.push(block);
        }
    }

    /// Let a block that is in use, and has no key, be found by one.
    pub fn name(&mut self, block: Block, key: u64) {
        self.named += 1;
        self.cached += 1;
        let record = &mut self.records[block as usize];
        debug_assert!(!record.is_named() && record.users > 0);
        (record.key, record.named_at, record.newer) = (key, self.named, NONE);
        let records = &self.records;
        let found = self.found.entry(
            spread(key),
            |&other| records[other as usize].key == key,
            |&other| spread(records[other as usize].key),
        );
        let mut last = *found.or_insert(block).get();
        while last != block {
            let newer = self.records[last as usize].newer;
            if newer == NONE {
                self.records[last as usize].newer = block;
                break;
            }
            last = newer;
        }
    }

    /// A job uses its blocks no more. The last of them is to be taken first, and those without a key before all others.
    pub fn leave(&mut self, blocks: &[Block]) {
        let mut behind = NONE; // blocks without a key, from the last to the first, come to the queue's front in this order
        for &block in blocks.iter().rev() {
            let record = &mut self.records[block as usize];
            record.users -= 1;
            if record.users > 0 {
                continue;
            }
            if record.is_named() {
                self.link(block, self.records[NONE as usize].before);
            } else {
                self.link(block, behind);
                behind = block;
            }
        }
    }

    /// Forget all keys.
    pub fn reset(&mut self) {
        self.found.clear();
        self.cached = 0;
        self.records.iter_mut().for_each(|record| record.named_at = 0);
    }

    /// Put a block into the queue behind another one, or in front behind [`NONE`].
    fn link(&mut self, block: Block, before: Block) {
        let after = self.records[before as usize].after;
        self.records[before as usize].after = block;
        self.records[after as usize].before = block;
        let record = &mut self.records[block as usize];
        (record.before, record.after) = (before, after);
        self.free += 1;
    }

    fn unlink(&mut self, block: Block) {
        let Record { before, after, .. } = self.records[block as usize];
        self.records[before as usize].after = after;
        self.records[after as usize].before = before;
        self.free -= 1;
    }

    fn forget(&mut self, block: Block) {
        let Record { key, newer, .. } = self.records[block as usize];
        self.records[block as usize].named_at = 0;
        self.cached -= 1;
        let records = &self.records;
        let is_its = |&other: &Block| records[other as usize].key == key;
        let Ok(mut found) = self.found.find_entry(spread(key), is_its) else { panic!("a named block is found") };
        let oldest = *found.get();
        if oldest != block {
            let mut last = oldest;
            while self.records[last as usize].newer != block {
                last = self.records[last as usize].newer;
            }
            self.records[last as usize].newer = newer;
        } else if newer == NONE {
            found.remove();
        } else {
            *found.get_mut() = newer;
        }
    }

    /// The oldest block that has a key.
    fn find(&self, key: u64) -> Option<Block> {
        self.found.find(spread(key), |&block| self.records[block as usize].key == key).copied()
    }
}

/// A key as a table's hash. Keys are hashes, but nobody has to believe it.
fn spread(key: u64) -> u64 {
    let product = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ product >> 32
}
