//! Jobs that get one token with each step, until they finish: what a step has to do for them, without a look at each.

use crate::jobs::{Jobs, Slot};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// They are the first of an engine's running jobs, in the same order.
///
/// With each step each of them has one token more, so that how far its last block is filled is as it was for all that were filled
/// as far: jobs are kept by that (their phase), and a step goes to those whose block is full, or becomes so.
pub struct Steady {
    /// Steps that have ended.
    steps: u64,
    count: usize,
    /// What they have in the cache, all together.
    context: u64,
    /// By what `computed - steps` is modulo the size of a block: in the order of running.
    phases: Vec<Vec<Slot>>,
    /// After which step, in the order of running, a job has all its tokens. Those that went before that are still in it.
    ends: BinaryHeap<Reverse<(u64, u64, Slot)>>,
}

impl Steady {
    pub fn new(block_size_tokens: u64) -> Self {
        let phases = (0..block_size_tokens).map(|_| Vec::new()).collect();
        Self { steps: 0, count: 0, context: 0, phases, ends: BinaryHeap::new() }
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn context(&self) -> u64 {
        self.context
    }

    /// Let in a running job that is behind all that are here.
    pub fn add(&mut self, jobs: &mut Jobs, slot: Slot) {
        let phase = self.phase(jobs[slot].computed);
        let job = &mut jobs[slot];
        let to_come = job.output_tokens - (job.tokens - job.prompt_tokens);
        self.ends.push(Reverse((self.steps + to_come, job.admitted, slot)));
        self.phases[phase].push(slot);
        self.count += 1;
        self.context += job.computed;
        // how many steps ago it had no token: until it goes, this says how many it has
        job.tokens = job.tokens.wrapping_sub(self.steps);
        job.computed = job.computed.wrapping_sub(self.steps);
        job.is_steady = true;
    }

    /// Let a job go, and say in it how far it came.
    pub fn remove(&mut self, jobs: &mut Jobs, slot: Slot) {
        let job = &mut jobs[slot];
        job.tokens = job.tokens.wrapping_add(self.steps);
        job.computed = job.computed.wrapping_add(self.steps);
        job.is_steady = false;
        self.count -= 1;
        self.context -= job.computed;
        let phase = self.phase(job.computed);
        self.phases[phase].retain(|&other| other != slot);
    }

    /// How many tokens of a job are computed.
    pub fn computed(&self, jobs: &Jobs, slot: Slot) -> u64 {
        jobs[slot].computed.wrapping_add(self.steps)
    }

    /// Those whose blocks are all full, and those whose last block the next token fills; in the order of running.
    pub fn at_edges(&self, jobs: &Jobs, edges: &mut Vec<Slot>) {
        edges.clear();
        let size = self.phases.len() as u64;
        let (full, filled) = (&self.phases[self.phase(0)], &self.phases[self.phase(size - 1)]);
        if size == 1 {
            edges.extend(full);
            return;
        }
        let (mut full, mut filled) = (full.iter().copied().peekable(), filled.iter().copied().peekable());
        loop {
            let next = match (full.peek(), filled.peek()) {
                (Some(&one), Some(&other)) if jobs[one].admitted < jobs[other].admitted => full.next(),
                (Some(_), None) => full.next(),
                (_, _) => filled.next(),
            };
            match next {
                Some(slot) => edges.push(slot),
                None => return,
            }
        }
    }

    /// A step has ended: each has one token more.
    pub fn advance(&mut self) {
        self.steps += 1;
        self.context += self.count as u64;
    }

    /// The next one, in the order of running, that has all its tokens.
    pub fn next_end(&mut self, jobs: &Jobs) -> Option<Slot> {
        while let Some(&Reverse((step, admitted, slot))) = self.ends.peek() {
            if step > self.steps {
                return None;
            }
            self.ends.pop();
            if jobs[slot].is_steady && jobs[slot].admitted == admitted {
                return Some(slot);
            }
        }
        None
    }

    /// Of a job with so many tokens computed now.
    fn phase(&self, computed: u64) -> usize {
        let size = self.phases.len() as u64;
        ((computed % size + size - self.steps % size) % size) as usize
    }
}
