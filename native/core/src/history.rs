//! Which blocks were routed to whom. As `kvatlas.route.prefix.history`, where endpoints have names instead of numbers.

use hashbrown::HashMap;
use hashlink::LinkedHashSet;
use smallvec::SmallVec;
use std::cmp::Reverse;

/// Estimated bytes of a block's hash with its endpoints: what Python needs, so that both evict at the same point. It is less here.
pub const BLOCK_BYTES: usize = 95;
/// The same of a block in the list of one endpoint.
pub const ENTRY_BYTES: usize = 215;

/// An endpoint: small, and used again once it is forgotten.
pub type Number = usize;

/// Endpoints as bits, by their numbers.
type Bits = SmallVec<[u64; 1]>;

const WORD: usize = u64::BITS as usize;

/// What was routed to one endpoint.
struct Routed {
    /// Oldest first.
    blocks: LinkedHashSet<u64>,
    /// How many endpoints came before it.
    order: u64,
}

/// Sizes, and what was given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Endpoints that something was routed to.
    pub endpoints: usize,
    /// Distinct blocks.
    pub blocks: usize,
    /// (block, endpoint) pairs.
    pub entries: usize,
    /// By the estimates above.
    pub bytes_estimated: usize,
    /// Entries that went because their endpoint's cache holds no more.
    pub evicted_capacity: u64,
    /// Entries that went because of the bound on all of them together.
    pub evicted_bytes: u64,
}

/// What was routed where. Beyond `bytes_max` the endpoint with most blocks loses its oldest.
pub struct History {
    bytes_max: usize,
    /// By hash; never no bit.
    holders: HashMap<u64, Bits>,
    /// By number.
    routed: Vec<Option<Routed>>,
    came: u64,
    entries: usize,
    evicted_capacity: u64,
    evicted_bytes: u64,
}

impl History {
    /// Nothing.
    pub fn new(bytes_max: usize) -> Self {
        let (holders, routed) = (HashMap::new(), Vec::new());
        Self { bytes_max, holders, routed, came: 0, entries: 0, evicted_capacity: 0, evicted_bytes: 0 }
    }

    /// How many leading blocks each endpoint got, of those that got any.
    pub fn matches(&self, hashes: &[u64]) -> Vec<(Number, usize)> {
        let mut found = Vec::new();
        let Some(mut unbroken) = hashes.first().and_then(|first| self.holders.get(first)).cloned() else { return found };
        for (count, hash) in hashes.iter().enumerate() {
            let holders = self.holders.get(hash).map_or(&[][..], |bits| bits);
            let mut is_anybody_left = false;
            for (at, word) in unbroken.iter_mut().enumerate() {
                let still = *word & holders.get(at).copied().unwrap_or(0);
                reached(&mut found, at, *word ^ still, count);
                *word = still;
                is_anybody_left |= still != 0;
            }
            if !is_anybody_left {
                return found;
            }
        }
        unbroken.iter().enumerate().for_each(|(at, word)| reached(&mut found, at, *word, hashes.len()));
        found
    }

    /// Note that a prompt was routed to an endpoint whose cache holds so many blocks.
    pub fn record(&mut self, endpoint: Number, hashes: &[u64], capacity_blocks: usize) {
        if self.routed.len() <= endpoint {
            self.routed.resize_with(endpoint + 1, || None);
        }
        let came = &mut self.came;
        let routed = self.routed[endpoint].get_or_insert_with(|| {
            *came += 1;
            Routed { blocks: LinkedHashSet::new(), order: *came }
        });
        let before = routed.blocks.len();
        for hash in hashes.iter().take(capacity_blocks).rev() {
            // the first one last: it stays longest
            if routed.blocks.insert(*hash) {
                set(self.holders.entry(*hash).or_default(), endpoint);
            }
        }
        let now = routed.blocks.len();
        self.entries += now - before;
        self.evicted_capacity += self.evict(endpoint, now.saturating_sub(capacity_blocks));
        self.shrink();
    }

    /// Forget an endpoint.
    pub fn forget(&mut self, endpoint: Number) {
        self.evict(endpoint, usize::MAX);
        if let Some(routed) = self.routed.get_mut(endpoint) {
            *routed = None;
        }
    }

    /// Sizes.
    pub fn stats(&self) -> Stats {
        Stats {
            endpoints: self.routed.iter().flatten().count(),
            blocks: self.holders.len(),
            entries: self.entries,
            bytes_estimated: self.bytes(),
            evicted_capacity: self.evicted_capacity,
            evicted_bytes: self.evicted_bytes,
        }
    }

    /// Evict an endpoint's oldest blocks; return how many.
    fn evict(&mut self, endpoint: Number, count_max: usize) -> u64 {
        let Some(Some(routed)) = self.routed.get_mut(endpoint) else { return 0 };
        let count = count_max.min(routed.blocks.len());
        for hash in std::iter::from_fn(|| routed.blocks.pop_front()).take(count) {
            if let Some(holders) = self.holders.get_mut(&hash) {
                holders[endpoint / WORD] ^= 1 << (endpoint % WORD);
                if holders.iter().all(|word| *word == 0) {
                    self.holders.remove(&hash);
                }
            }
        }
        self.entries -= count;
        count as u64
    }

    fn shrink(&mut self) {
        while self.bytes() > self.bytes_max && self.entries > 0 {
            let count = (self.bytes() - self.bytes_max).div_ceil(BLOCK_BYTES + ENTRY_BYTES);
            let numbered = self.routed.iter().enumerate().filter_map(|(number, routed)| Some((number, routed.as_ref()?)));
            let fullest = numbered.max_by_key(|(_, routed)| (routed.blocks.len(), Reverse(routed.order)));
            let Some((fullest, _)) = fullest else { return };
            self.evicted_bytes += self.evict(fullest, count);
        }
    }

    fn bytes(&self) -> usize {
        self.holders.len() * BLOCK_BYTES + self.entries * ENTRY_BYTES
    }
}

/// Note for the endpoints of a word of bits that they got so many blocks.
fn reached(found: &mut Vec<(Number, usize)>, at: usize, mut bits: u64, count: usize) {
    while bits != 0 {
        found.push((at * WORD + bits.trailing_zeros() as usize, count));
        bits &= bits - 1;
    }
}

fn set(bits: &mut Bits, number: Number) {
    if bits.len() <= number / WORD {
        bits.resize(number / WORD + 1, 0);
    }
    bits[number / WORD] |= 1 << (number % WORD);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_matched_up_to_its_first_gap_whatever_others_hold() {
        let mut history = History::new(usize::MAX);
        history.record(0, &[1, 2, 3, 4], 100);
        history.record(70, &[1, 2], 100);
        history.record(2, &[2, 3, 4], 100);
        let mut found = history.matches(&[1, 2, 3, 4, 5]);
        found.sort_unstable();
        assert_eq!(found, [(0, 4), (70, 2)]);
        assert!(history.matches(&[]).is_empty() && history.matches(&[9]).is_empty());
    }

    #[test]
    fn of_a_prompt_the_end_is_evicted_first() {
        let mut history = History::new(usize::MAX);
        history.record(0, &[1, 2, 3], 4);
        history.record(0, &[7, 8], 4);
        assert_eq!((history.matches(&[1, 2, 3]), history.matches(&[7, 8])), (vec![(0, 2)], vec![(0, 2)]));
        assert_eq!(history.stats().evicted_capacity, 1);
    }

    #[test]
    fn who_is_forgotten_leaves_nothing() {
        let mut history = History::new(usize::MAX);
        history.record(65, &[1, 2], 100);
        history.record(0, &[1], 100);
        history.forget(65);
        history.forget(99);
        let left =
            Stats { endpoints: 1, blocks: 1, entries: 1, bytes_estimated: BLOCK_BYTES + ENTRY_BYTES, ..Stats::default() };
        assert_eq!(history.stats(), left);
    }
}
