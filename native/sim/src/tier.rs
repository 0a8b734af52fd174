//! Memory below the GPU's. As `kvatlas.sim.blocks.Tier`.

use hashlink::LinkedHashSet;

/// Keys in the order of their use.
pub struct Tier {
    blocks: usize,
    /// The least recently used first.
    keys: LinkedHashSet<u64>,
}

impl Tier {
    /// With room for so many.
    pub fn new(blocks: usize) -> Self {
        Self { blocks, keys: LinkedHashSet::new() }
    }

    /// Whether a key is here.
    pub fn holds(&self, key: u64) -> bool {
        self.keys.contains(&key)
    }

    /// A prompt with these keys came: those that are here were used, the first of them last.
    pub fn touch(&mut self, keys: &[u64]) {
        for key in keys.iter().rev() {
            self.keys.to_back(key);
        }
    }

    /// Write blocks, as many as there is room for. `new`: the positions of those that were not here; `lost`: what went for them.
    pub fn store(&mut self, keys: &[u64], new: &mut Vec<usize>, lost: &mut Vec<u64>) {
        new.extend((0..keys.len()).filter(|&at| !self.keys.contains(&keys[at])).take(self.blocks));
        let excess = (self.keys.len() + new.len()).saturating_sub(self.blocks);
        lost.extend((0..excess).filter_map(|_| self.keys.pop_front()));
        for &at in new.iter().rev() {
            self.keys.insert(keys[at]);
        }
    }
}
