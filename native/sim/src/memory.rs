//! What an engine does with its memory for a job. As `kvatlas.sim.memory`.

use crate::frame::Frame;
use crate::jobs::Job;
use crate::pool::{BlockPool, Hits};
use crate::spec::EngineSpec;
use crate::tier::Tier;
use crate::told::{Events, Told};
use std::ops::Range;

/// What a job without blocks begins with. The next one's search begins with what was found for the last one.
#[derive(Default)]
pub struct Found {
    /// On the GPU.
    pub hits: Hits,
    /// For each of its next blocks, the tier that has it.
    pub sources: Vec<usize>,
}

/// All of one engine's memory.
pub struct Memory {
    pub gpu: BlockPool,
    tiers: Vec<Tier>,
    found: Found,
    /// A job that does not fit in, and the key of its first block that is not on the GPU. It will not until that is named, or a
    /// job begins to use blocks that were found for it, or leaves some: blocks that are taken only make it worse.
    hopeless: Option<(i64, Option<u64>)>,
    lost: Vec<u64>,
    new: Vec<usize>,
    news: News,
}

/// Tells what happens to one engine's memory.
struct News {
    engine: usize,
    frame: Frame,
}

impl Memory {
    pub fn new(engine: usize, spec: &EngineSpec) -> Self {
        let tiers = spec.tiers.iter().map(|tier| Tier::new(tier.blocks)).collect();
        let gpu = BlockPool::new(spec.gpu_blocks);
        let news = News { engine, frame: Frame::default() };
        Self { gpu, tiers, found: Found::default(), hopeless: None, lost: Vec::new(), new: Vec::new(), news }
    }

    /// Find what a job without blocks begins with, never all of it. For a job that has to wait, this is asked again and again.
    pub fn lookup(&mut self, spec: &EngineSpec, job: &Job) -> &Found {
        let Found { hits, sources } = &mut self.found;
        sources.clear();
        if spec.prefix_caching {
            let keys = &job.keys[..spec.full_blocks(job.tokens - 1)];
            self.gpu.prefix(keys, hits);
            let source = |&key: &u64| self.tiers.iter().position(|tier| tier.holds(key));
            sources.extend(keys[hits.blocks.len()..].iter().map_while(source));
        }
        &self.found
    }

    /// Whether it is known that a job does not fit in, without another search.
    pub fn is_hopeless(&self, job: &Job) -> bool {
        self.hopeless.is_some_and(|(id, _)| id == job.id)
    }

    /// Remember that a job, for which was searched last, does not fit in.
    pub fn set_hopeless(&mut self, job: &Job) {
        self.hopeless = Some((job.id, job.keys.get(self.found.hits.blocks.len()).copied()));
    }

    /// Forget all keys of the GPU.
    pub fn reset(&mut self) {
        self.gpu.reset();
        self.hopeless = None;
    }

    /// How many of the blocks that were found last nobody uses.
    pub fn idle_hits(&self) -> usize {
        self.gpu.unused(&self.found.hits.blocks)
    }

    /// Give a job without blocks those that [`Memory::lookup`] has just found for it.
    pub fn use_found(&mut self, spec: &EngineSpec, job: &mut Job) {
        self.gpu.use_named(&self.found.hits.blocks);
        self.hopeless = None;
        job.blocks.clone_from(&self.found.hits.blocks);
        job.named = job.blocks.len();
        job.computed = job.blocks.len() as u64 * spec.block_size_tokens;
        if !job.is_started {
            job.cached = job.computed;
        }
        self.touch(spec, job);
    }

    /// Give a job free blocks, of which there are enough.
    pub fn take(&mut self, spec: &EngineSpec, job: &mut Job, count: usize, at_s: f64, told: &mut Told) {
        self.lost.clear();
        self.gpu.take(count, &mut job.blocks, &mut self.lost);
        self.news.removed(spec, &self.lost, 0, at_s, told);
    }

    /// Let those of a job's blocks be found that so many tokens fill, and write them to all tiers that lack them.
    pub fn name(&mut self, spec: &EngineSpec, job: &mut Job, tokens: u64, at_s: f64, told: &mut Told) {
        let full = spec.full_blocks(tokens);
        if full <= job.named || !spec.prefix_caching {
            return;
        }
        let first = std::mem::replace(&mut job.named, full);
        let keys = &job.keys[first..full];
        for (&block, &key) in job.blocks[first..full].iter().zip(keys) {
            self.gpu.name(block, key);
            if self.hopeless.is_some_and(|(_, gap)| gap == Some(key)) {
                self.hopeless = None;
            }
        }
        self.news.stored(spec, job, first..full, 0, at_s, told);
        for (at, tier) in self.tiers.iter_mut().enumerate() {
            self.new.clear();
            self.lost.clear();
            tier.store(keys, &mut self.new, &mut self.lost);
            self.news.removed(spec, &self.lost, at + 1, at_s, told);
            for run in self.new.chunk_by(|one, next| one + 1 == *next) {
                let begin = first + run[0];
                self.news.stored(spec, job, begin..begin + run.len(), at + 1, at_s, told);
            }
        }
    }

    /// Publish what happened since the last time, if it is told in frames.
    pub fn publish(&mut self, spec: &EngineSpec, at_s: f64, told: &mut Told) {
        if let Some(payload) = self.news.frame.take(spec, at_s) {
            told.published(at_s, self.news.engine, payload);
        }
    }

    /// Take a job's blocks away.
    pub fn leave(&mut self, job: &Job) {
        self.hopeless = None;
        self.gpu.leave(&job.blocks);
    }

    /// Let tiers note that a job's keys are used.
    pub fn touch(&mut self, spec: &EngineSpec, job: &Job) {
        for tier in &mut self.tiers {
            tier.touch(&job.keys[..spec.full_blocks(job.tokens).min(job.keys.len())]);
        }
    }
}

impl News {
    fn stored(&mut self, spec: &EngineSpec, job: &Job, blocks: Range<usize>, tier: usize, at_s: f64, told: &mut Told) {
        match told.events {
            Events::Nothing => {}
            Events::Each => told.stored(at_s, self.engine, job.id, blocks, tier),
            Events::Frames => self.frame.stored(spec, job, blocks, tier),
        }
    }

    fn removed(&mut self, spec: &EngineSpec, keys: &[u64], tier: usize, at_s: f64, told: &mut Told) {
        match told.events {
            _ if keys.is_empty() => {}
            Events::Nothing => {}
            Events::Each => told.removed(at_s, self.engine, keys, tier),
            Events::Frames => self.frame.removed(spec, keys, tier),
        }
    }
}

/// How long it takes to load blocks from the tiers that have them, one tier after the other.
pub fn load_seconds(spec: &EngineSpec, sources: &[usize]) -> f64 {
    let mut seconds = 0.0;
    for (at, tier) in spec.tiers.iter().enumerate() {
        let blocks = sources.iter().filter(|&&source| source == at).count();
        if blocks > 0 {
            seconds += tier.latency_s + blocks as f64 * tier.load_block_s;
        }
    }
    seconds
}
