//! What was done, counted.

/// What applying events did, in blocks. As `kvatlas.types.ApplyReport`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Announced.
    pub stored: u64,
    /// Removed, where a copy was known.
    pub removed: u64,
    /// Copies that went with a cleared tier.
    pub cleared: u64,
    /// Stored again while resident: one more copy.
    pub duplicates: u64,
    /// Removals of blocks that the index does not hold.
    pub removed_unknown: u64,
    /// Kept by engine hash only.
    pub orphaned: u64,
    /// Orphans whose keys became known.
    pub adopted: u64,
    /// Orphans given up because their bound was reached.
    pub orphans_dropped: u64,
    /// Stored where no more places are kept apart.
    pub refused: u64,
}

impl Report {
    /// Add what was done later.
    pub fn add(&mut self, later: &Report) {
        self.stored += later.stored;
        self.removed += later.removed;
        self.cleared += later.cleared;
        self.duplicates += later.duplicates;
        self.removed_unknown += later.removed_unknown;
        self.orphaned += later.orphaned;
        self.adopted += later.adopted;
        self.orphans_dropped += later.orphans_dropped;
        self.refused += later.refused;
    }
}

/// How far an index may grow. As `kvatlas.index.protocol.IndexLimits`.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Blocks not stored or asked for within this time go.
    pub ttl_s: f64,
    /// Keys with a holder.
    pub blocks_max: usize,
    /// Estimated bytes.
    pub bytes_max: usize,
    /// Per stream.
    pub orphans_max: usize,
    /// Per stream.
    pub retired_max: usize,
    /// Records of speculative entries.
    pub promises_max: usize,
}

/// Sizes of an index. As `kvatlas.types.IndexStats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Keys with a holder.
    pub blocks: usize,
    /// (key, slot) pairs.
    pub entries: usize,
    /// Orphans that are held.
    pub orphans: usize,
    /// Promises.
    pub speculative: usize,
    /// Streams known.
    pub streams: usize,
    /// Pods known.
    pub pods: usize,
    /// Estimated memory.
    pub bytes_estimated: usize,
    /// Keys evicted, by reason: `ttl`, `size`, `bytes`.
    pub evicted: [u64; 3],
}
