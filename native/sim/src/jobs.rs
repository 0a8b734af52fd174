//! Jobs on their way through an engine. As `kvatlas.sim.work.Work`, which says what the fields mean.

use crate::pool::Block;
use hashbrown::HashMap;

/// Where a job is in its engine's memory.
pub type Slot = u32;

/// One job.
#[derive(Default)]
pub struct Job {
    pub(crate) id: i64,
    pub(crate) keys: Vec<u64>,
    pub(crate) token_ids: Vec<u32>,
    pub(crate) prompt_tokens: u64,
    pub(crate) output_tokens: u64,
    pub(crate) tokens: u64,
    pub(crate) computed: u64,
    pub(crate) blocks: Vec<Block>,
    pub(crate) named: usize,
    pub(crate) cached: u64,
    pub(crate) loads: usize,
    pub(crate) ready_s: f64,
    pub(crate) is_started: bool,
    /// Its place among all jobs that were ever let in here: those that run are in this order.
    pub(crate) admitted: u64,
    /// Whether it is among the steady ones; then `tokens` and `computed` are as they were when it came to them.
    pub(crate) is_steady: bool,
}

impl Job {
    /// One that has just come. `token_ids` may be empty: frames tell of no tokens then.
    pub fn new(id: i64, keys: Vec<u64>, token_ids: Vec<u32>, prompt_tokens: u64, output_tokens: u64) -> Self {
        Self { id, keys, token_ids, prompt_tokens, output_tokens, tokens: prompt_tokens, ..Self::default() }
    }

    /// All but its newest token is computed, and it has told one before.
    pub(crate) fn is_answering(&self) -> bool {
        self.is_steady || (self.tokens > self.prompt_tokens && self.computed + 1 == self.tokens)
    }
}

/// All jobs of an engine.
#[derive(Default)]
pub(crate) struct Jobs {
    jobs: Vec<Job>,
    vacant: Vec<Slot>,
    slots: HashMap<i64, Slot>,
}

impl Jobs {
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub fn find(&self, id: i64) -> Option<Slot> {
        self.slots.get(&id).copied()
    }

    pub fn insert(&mut self, job: Job) -> Slot {
        let id = job.id;
        let slot = match self.vacant.pop() {
            Some(slot) => {
                self[slot] = job;
                slot
            }
            None => {
                self.jobs.push(job);
                self.jobs.len() as Slot - 1
            }
        };
        self.slots.insert(id, slot);
        slot
    }

    /// Take a job out. What a slot held is never `is_steady` afterwards.
    pub fn remove(&mut self, slot: Slot) -> Job {
        let job = std::mem::take(&mut self[slot]);
        self.slots.remove(&job.id);
        self.vacant.push(slot);
        job
    }
}

impl std::ops::Index<Slot> for Jobs {
    type Output = Job;

    fn index(&self, slot: Slot) -> &Job {
        &self.jobs[slot as usize]
    }
}

impl std::ops::IndexMut<Slot> for Jobs {
    fn index_mut(&mut self, slot: Slot) -> &mut Job {
        &mut self.jobs[slot as usize]
    }
}
