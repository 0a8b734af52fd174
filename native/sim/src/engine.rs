//! One engine: which jobs a step computes, and how long it takes. As `kvatlas.sim.batching`.

use crate::jobs::{Job, Jobs, Slot};
use crate::memory::{Memory, load_seconds};
use crate::spec::{EngineSpec, StepWork};
use crate::steady::Steady;
use crate::told::{Kind, Told};
use std::collections::VecDeque;

/// How busy an engine is. As `kvatlas.sim.engines.EngineState`.
#[allow(missing_docs)]
#[derive(Clone)]
pub struct State {
    pub waiting: usize,
    pub running: usize,
    pub blocks_used: usize,
    pub cached_blocks: usize,
    pub step_ends_s: Option<f64>,
    pub preemptions: u64,
    pub busy_s: f64,
}

/// One engine's queues, memory and step.
pub struct Engine {
    number: usize,
    spec: EngineSpec,
    /// So many times as long as the costs say a step takes that begins now.
    slowness: f64,
    jobs: Jobs,
    memory: Memory,
    /// In the order in which they were admitted: steady ones, then others.
    running: Vec<Slot>,
    steady: Steady,
    loading: Vec<Slot>,
    waiting: VecDeque<Slot>,
    /// What the step under way computes of jobs that are not steady.
    batch: Vec<(Slot, u64)>,
    step_ends_s: Option<f64>,
    wakes_s: f64,
    step_s: f64,
    loads_end_s: f64,
    admitted: u64,
    preemptions: u64,
    busy_s: f64,
    edges: Vec<Slot>,
    /// Jobs that waited when the step under way began.
    left_waiting: usize,
    metrics: Option<State>,
}

impl Engine {
    pub(crate) fn new(number: usize, spec: EngineSpec) -> Self {
        let (memory, steady) = (Memory::new(number, &spec), Steady::new(spec.block_size_tokens));
        let (jobs, running, loading, waiting) = (Jobs::default(), Vec::new(), Vec::new(), VecDeque::new());
        let (step_ends_s, wakes_s, step_s, loads_end_s, busy_s) = (None, f64::INFINITY, 0.0, 0.0, 0.0);
        let (batch, edges, admitted, preemptions) = (Vec::new(), Vec::new(), 0, 0);
        Self {
            number,
            spec,
            slowness: 1.0,
            jobs,
            memory,
            running,
            steady,
            loading,
            waiting,
            batch,
            step_ends_s,
            wakes_s,
            step_s,
            loads_end_s,
            admitted,
            preemptions,
            busy_s,
            edges,
            left_waiting: 0,
            metrics: None,
        }
    }

    /// When something happens here next; infinity if nothing will by itself.
    pub(crate) fn due_s(&self) -> f64 {
        self.step_ends_s.unwrap_or(self.wakes_s)
    }

    pub(crate) fn is_stepping(&self) -> bool {
        self.step_ends_s.is_some()
    }

    pub(crate) fn has(&self, job: i64) -> bool {
        self.jobs.find(job).is_some()
    }

    pub(crate) fn state(&self) -> State {
        State {
            waiting: self.waiting.len() + self.loading.len(),
            running: self.running.len(),
            blocks_used: self.memory.gpu.used(),
            cached_blocks: self.memory.gpu.cached(),
            step_ends_s: self.step_ends_s,
            preemptions: self.preemptions,
            busy_s: self.busy_s,
        }
    }

    /// As `Engines.metrics`.
    pub(crate) fn metrics(&self) -> State {
        self.metrics.clone().filter(|_| !self.jobs.is_empty()).unwrap_or_else(|| self.state())
    }

    /// All jobs, those that run before those that wait.
    pub(crate) fn job_ids(&self) -> Vec<i64> {
        let slots = self.running.iter().chain(&self.loading).chain(&self.waiting);
        slots.map(|&slot| self.jobs[slot].id).collect()
    }

    /// Whether it can ever run a job: its memory, without its own one block, holds all that is computed.
    pub(crate) fn fits(&self, prompt_tokens: u64, output_tokens: u64) -> bool {
        self.spec.blocks_for(prompt_tokens + output_tokens - 1) < self.spec.gpu_blocks as usize
    }

    /// Let a job wait that fits into the memory.
    pub(crate) fn add(&mut self, job: Job, at_s: f64) {
        self.waiting.push_back(self.jobs.insert(job));
        self.wakes_s = at_s;
    }

    /// Drop a job, also out of the step under way, whose length stays. Whether it was there.
    pub(crate) fn abort(&mut self, id: i64, at_s: f64) -> bool {
        let Some(slot) = self.jobs.find(id) else { return false };
        if self.jobs[slot].is_steady {
            self.steady.remove(&mut self.jobs, slot);
        }
        self.running.retain(|&other| other != slot);
        self.loading.retain(|&other| other != slot);
        self.waiting.retain(|&other| other != slot);
        self.batch.retain(|&(other, _)| other != slot);
        let job = self.jobs.remove(slot);
        self.memory.leave(&job);
        self.wakes_s = self.wakes_at(at_s);
        true
    }

    /// Forget what the GPU holds, unless jobs use it.
    pub(crate) fn reset_cache(&mut self) -> bool {
        let is_unused = self.memory.gpu.used() == 0;
        if is_unused {
            self.memory.reset();
        }
        is_unused
    }

    /// Let steps take so many times as long as the costs say, from the next one on.
    pub(crate) fn slow(&mut self, factor: f64) {
        self.slowness = factor;
    }

    /// Decide what is computed next, and how long it takes. Nothing may be: then it says when to ask again.
    pub(crate) fn begin_step(&mut self, at_s: f64, told: &mut Told) {
        let preemptions = self.preemptions;
        self.schedule(at_s, told);
        if self.is_batch_empty() && self.preemptions > preemptions {
            self.schedule(at_s, told); // the only job that ran had to give way: now others may be let in
        }
        self.memory.publish(&self.spec, at_s, told);
        if self.is_batch_empty() {
            let ready_s = self.loading.iter().map(|&slot| self.jobs[slot].ready_s).filter(|&ready_s| ready_s > at_s);
            self.wakes_s = ready_s.fold(f64::INFINITY, f64::min);
            self.metrics = Some(self.state());
        } else {
            self.step_s = self.slowness * self.spec.costs.step_seconds(self.step_work());
            self.step_ends_s = Some(at_s + self.step_s);
            self.left_waiting = self.waiting.len() + self.loading.len();
        }
    }

    /// Let the step's tokens come. Whether a job finished.
    pub(crate) fn end_step(&mut self, at_s: f64, told: &mut Told) -> bool {
        let before = self.running.len();
        self.steady.advance();
        while let Some(slot) = self.steady.next_end(&self.jobs) {
            self.steady.remove(&mut self.jobs, slot);
            self.finish(slot, at_s, told);
        }
        let mut batch = std::mem::take(&mut self.batch);
        for (slot, computed) in batch.drain(..) {
            let job = &mut self.jobs[slot];
            job.computed += computed;
            if job.computed == job.tokens {
                job.tokens += 1;
                self.answer(slot, at_s, told);
            }
        }
        self.batch = batch;
        while let Some(&slot) = self.running.get(self.steady.count()) {
            if !self.jobs[slot].is_answering() || self.steady.count() as u64 == self.spec.step_tokens_max {
                break;
            }
            self.steady.add(&mut self.jobs, slot);
        }
        self.busy_s += self.step_s;
        self.step_ends_s = None;
        self.wakes_s = self.wakes_at(at_s);
        self.metrics = Some(State { waiting: self.left_waiting, ..self.state() });
        self.running.len() < before
    }

    fn wakes_at(&self, at_s: f64) -> f64 {
        if self.jobs.is_empty() { f64::INFINITY } else { at_s }
    }

    fn is_batch_empty(&self) -> bool {
        self.batch.is_empty() && self.steady.count() == 0
    }

    /// Jobs that run come first, then those that wait; none of these if one of those had to give way.
    fn schedule(&mut self, at_s: f64, told: &mut Told) {
        let preemptions = self.preemptions;
        self.continue_steady(at_s, told);
        let mut budget = self.spec.step_tokens_max - self.steady.count() as u64;
        let mut position = self.steady.count();
        while position < self.running.len() && budget > 0 {
            let slot = self.running[position];
            let job = &self.jobs[slot];
            let tokens = job.computed + (job.tokens - job.computed).min(budget);
            let lacks = self.lacks(slot, tokens);
            self.make_room(lacks, position, at_s, told);
            if position < self.running.len() {
                budget -= self.compute(slot, budget, at_s, told);
                position += 1;
            }
        }
        while self.preemptions == preemptions && budget > 0 && self.running.len() < self.spec.running_max {
            let Some(slot) = self.next(at_s) else { break };
            if !self.admit(slot, at_s, told) {
                break;
            }
            if self.jobs[slot].loads == 0 {
                budget -= self.compute(slot, budget, at_s, told);
            }
        }
    }

    /// Give steady jobs the blocks that they need, and let those be found that they fill.
    fn continue_steady(&mut self, at_s: f64, told: &mut Told) {
        let mut edges = std::mem::take(&mut self.edges);
        self.steady.at_edges(&self.jobs, &mut edges);
        for &slot in &edges {
            if !self.jobs[slot].is_steady {
                continue; // it had to give way
            }
            let computed = self.steady.computed(&self.jobs, slot);
            if computed.is_multiple_of(self.spec.block_size_tokens) {
                if self.memory.gpu.free() == 0 {
                    let place = self.jobs[slot].admitted;
                    let position = self.running.partition_point(|&other| self.jobs[other].admitted < place);
                    self.make_room(1, position, at_s, told);
                    if position >= self.running.len() {
                        break;
                    }
                }
                self.memory.take(&self.spec, &mut self.jobs[slot], 1, at_s, told);
            }
            self.memory.name(&self.spec, &mut self.jobs[slot], computed + 1, at_s, told);
        }
        self.edges = edges;
    }

    /// Preempt the last jobs until so many blocks are free, or the job at a position had to give way itself.
    fn make_room(&mut self, blocks: usize, position: usize, at_s: f64, told: &mut Told) {
        while position < self.running.len() && blocks > self.memory.gpu.free() {
            let slot = self.running.pop().expect("it is not empty");
            if self.jobs[slot].is_steady {
                self.steady.remove(&mut self.jobs, slot);
            }
            let job = &mut self.jobs[slot];
            self.memory.leave(job);
            job.blocks.clear();
            (job.named, job.computed) = (0, 0);
            told.job(at_s, Kind::Preempted, self.number, job.id, 0, 0);
            self.waiting.push_front(slot);
            self.preemptions += 1;
        }
    }

    /// Who would be let in next: those that hold blocks come before those that hold none.
    fn next(&self, at_s: f64) -> Option<Slot> {
        let ready = self.loading.iter().find(|&&slot| self.jobs[slot].ready_s <= at_s);
        ready.or(self.waiting.front()).copied()
    }

    /// Let a job run, or begin to load what tiers have of it. False where its tokens do not fit in.
    fn admit(&mut self, slot: Slot, at_s: f64, told: &mut Told) -> bool {
        let (free, wanted) = (self.memory.gpu.free(), self.lacks(slot, self.jobs[slot].tokens));
        if let Some(position) = self.loading.iter().position(|&other| other == slot) {
            if self.jobs[slot].loads > 0 {
                self.end_load(slot, at_s, told);
            }
            if wanted > free {
                return false;
            }
            self.loading.remove(position);
            self.start(slot);
            return true;
        }
        if self.memory.is_hopeless(&self.jobs[slot]) {
            return false;
        }
        let found = self.memory.lookup(&self.spec, &self.jobs[slot]);
        let (hits, loads, seconds) = (found.hits.blocks.len(), found.sources.len(), load_seconds(&self.spec, &found.sources));
        let idle = self.memory.idle_hits();
        if wanted - hits + idle > free {
            self.memory.set_hopeless(&self.jobs[slot]);
            return false;
        }
        if loads > 0 && loads + idle + self.reserved() > free {
            return false;
        }
        self.waiting.pop_front();
        self.memory.use_found(&self.spec, &mut self.jobs[slot]);
        if loads > 0 {
            self.begin_load(slot, loads, seconds, at_s, told);
        } else {
            self.start(slot);
        }
        true
    }

    fn start(&mut self, slot: Slot) {
        self.jobs[slot].admitted = self.admitted;
        self.admitted += 1;
        self.running.push(slot);
    }

    /// The blocks that jobs yet need for their prompts. A load must not take them, because it is not preempted.
    fn reserved(&self) -> usize {
        let others = self.running[self.steady.count()..].iter().filter(|&&slot| !self.jobs[slot].is_answering());
        others.chain(&self.loading).map(|&slot| self.lacks(slot, self.jobs[slot].tokens)).sum()
    }

    /// How many blocks more a job needs for so many tokens.
    fn lacks(&self, slot: Slot, tokens: u64) -> usize {
        self.spec.blocks_for(tokens).saturating_sub(self.jobs[slot].blocks.len())
    }

    /// Loads of one engine come one after the other.
    fn begin_load(&mut self, slot: Slot, loads: usize, seconds: f64, at_s: f64, told: &mut Told) {
        let job = &mut self.jobs[slot];
        self.memory.take(&self.spec, job, loads, at_s, told);
        self.loads_end_s = self.loads_end_s.max(at_s) + seconds;
        (job.loads, job.ready_s) = (loads, self.loads_end_s);
        self.loading.push(slot);
    }

    fn end_load(&mut self, slot: Slot, at_s: f64, told: &mut Told) {
        let job = &mut self.jobs[slot];
        job.computed += std::mem::take(&mut job.loads) as u64 * self.spec.block_size_tokens;
        let computed = job.computed;
        self.memory.name(&self.spec, job, computed, at_s, told);
    }

    /// Put the next tokens of a running job into the step, for which there is room. How many.
    fn compute(&mut self, slot: Slot, budget: u64, at_s: f64, told: &mut Told) -> u64 {
        let tokens = (self.jobs[slot].tokens - self.jobs[slot].computed).min(budget);
        let lacks = self.lacks(slot, self.jobs[slot].computed + tokens);
        let job = &mut self.jobs[slot];
        if !job.is_started {
            told.job(at_s, Kind::Scheduled, self.number, job.id, job.cached, job.computed - job.cached);
            job.is_started = true;
        }
        let computed = job.computed + tokens;
        self.memory.take(&self.spec, job, lacks, at_s, told);
        self.memory.name(&self.spec, job, computed, at_s, told);
        self.batch.push((slot, tokens));
        tokens
    }

    fn step_work(&self) -> StepWork {
        let (decodes, decode_context) = (self.steady.count() as u64, self.steady.context());
        let mut work = StepWork { decodes, decode_context, ..StepWork::default() };
        for &(slot, tokens) in &self.batch {
            let job = &self.jobs[slot];
            if job.is_answering() {
                work.decodes += 1;
                work.decode_context += job.computed;
            } else {
                work.prompt_tokens += tokens;
                work.prompt_pairs += tokens * (2 * job.computed + tokens);
            }
        }
        work
    }

    /// Tell the newest token of a job that is not steady.
    fn answer(&mut self, slot: Slot, at_s: f64, told: &mut Told) {
        let job = &self.jobs[slot];
        let answered = job.tokens - job.prompt_tokens;
        if answered == 1 {
            told.job(at_s, Kind::FirstToken, self.number, job.id, 0, 0);
        }
        if answered == job.output_tokens {
            self.finish(slot, at_s, told);
        }
    }

    fn finish(&mut self, slot: Slot, at_s: f64, told: &mut Told) {
        let place = self.jobs[slot].admitted;
        let position = self.running.partition_point(|&other| self.jobs[other].admitted < place);
        self.running.remove(position);
        let job = self.jobs.remove(slot);
        told.job(at_s, Kind::Finished, self.number, job.id, 0, 0);
        self.memory.leave(&job);
        self.memory.touch(&self.spec, &job);
    }
}
