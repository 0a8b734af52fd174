//! The GPU's blocks. As `kvatlas.sim.blocks.BlockPool`.

use hashbrown::HashMap;

/// A block's number.
pub type Block = u32;

/// The block that nobody gets: it ends lists.
const NONE: Block = 0;

/// What is known of one block.
#[derive(Clone, Copy, Default)]
struct Record {
    key: u64,
    users: u32,
    is_named: bool,
    /// How many times blocks had been named before it was.
    named_at: u64,
    /// The next newer block with the same key.
    newer: Block,
    /// Neighbours in the queue of free blocks.
    before: Block,
    after: Block,
}

/// Blocks by number, free ones in a queue: the next to be taken is behind block 0, the last before it.
pub struct BlockPool {
    records: Vec<Record>,
    /// Key -> the oldest block that has it.
    found: HashMap<u64, Block>,
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
        Self { records, found: HashMap::new(), free: blocks as usize - 1, cached: 0, named: 0 }
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
            record.is_named && record.key == *key && record.named_at < hits.at // it was the oldest with this key, and still is
        };
        let still = hits.blocks.iter().zip(keys).take_while(|&pair| is_still(pair)).count();
        hits.blocks.truncate(still);
        hits.blocks.extend(keys[still..].iter().map_while(|key| self.found.get(key)));
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
            if self.records[block as usize].is_named {
                lost.push(self.records[block as usize].key);
                self.forget(block);
            }
            taken.push(block);
        }
    }

    /// Let a block that is in use, and has no key, be found by one.
    pub fn name(&mut self, block: Block, key: u64) {
        let record = &mut self.records[block as usize];
        debug_assert!(!record.is_named && record.users > 0);
        (record.key, record.is_named, record.newer) = (key, true, NONE);
        record.named_at = self.named;
        self.named += 1;
        self.cached += 1;
        let mut last = *self.found.entry(key).or_insert(block);
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
            if record.is_named {
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
        self.records.iter_mut().for_each(|record| record.is_named = false);
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
        self.records[block as usize].is_named = false;
        self.cached -= 1;
        let oldest = self.found.get_mut(&key).expect("a named block is found");
        if *oldest != block {
            let mut last = *oldest;
            while self.records[last as usize].newer != block {
                last = self.records[last as usize].newer;
            }
            self.records[last as usize].newer = newer;
        } else if newer == NONE {
            self.found.remove(&key);
        } else {
            *oldest = newer;
        }
    }
}
