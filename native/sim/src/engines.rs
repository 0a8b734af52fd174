//! Engines on one virtual clock. As `kvatlas.sim.reference.ReferenceEngines`.

use crate::engine::{Engine, State};
use crate::jobs::Job;
use crate::spec::EngineSpec;
use crate::told::{Events, Kind, Told};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Any number of engines, by their numbers.
#[derive(Default)]
pub struct Engines {
    engines: Vec<Option<Engine>>,
    now_s: f64,
    /// When something is due, as bits, and at which engine. Some entries are out of date: what engines say counts.
    due: BinaryHeap<Reverse<(u64, usize)>>,
    told: Told,
    /// Engines with something to do at one time.
    here: Vec<usize>,
}

/// What was asked is refused; nothing has changed.
pub type Refused = String;

impl Engines {
    /// As `Engines.join`.
    pub fn join(&mut self, spec: EngineSpec, at_s: f64) -> Result<usize, Refused> {
        self.go_to(at_s)?;
        let number = self.engines.len();
        self.engines.push(Some(Engine::new(number, spec)));
        Ok(number)
    }

    /// As `Engines.leave`.
    pub fn leave(&mut self, number: usize, at_s: f64) -> Result<Vec<i64>, Refused> {
        self.engine(number)?;
        self.go_to(at_s)?;
        let mut jobs = self.engines[number].take().map_or_else(Vec::new, |engine| engine.job_ids());
        let refused = self.told.happenings.extract_if(.., |happening| happening.engine == number);
        jobs.extend(refused.map(|happening| happening.job)); // between runs, only refusals wait to be told
        Ok(jobs)
    }

    /// As `Engines.add`, of a job with keys for all its whole blocks.
    pub fn add(&mut self, number: usize, job: Job, at_s: f64) -> Result<(), Refused> {
        let id = job.id;
        if self.engine(number)?.has(id) {
            return Err(format!("job {id}: engine {number} has a job of this id; give each its own"));
        }
        let at_s = self.go_to(at_s)?;
        let engine = self.engine(number)?;
        if engine.fits(job.prompt_tokens, job.output_tokens) {
            engine.add(job, at_s);
            self.note_due(number);
        } else {
            self.told.job(at_s, Kind::Refused, number, id, 0, 0);
        }
        Ok(())
    }

    /// As `Engines.abort`.
    pub fn abort(&mut self, number: usize, job: i64, at_s: f64) -> Result<bool, Refused> {
        self.engine(number)?;
        let at_s = self.go_to(at_s)?;
        let was_there = self.engine(number)?.abort(job, at_s);
        self.note_due(number);
        Ok(was_there)
    }

    /// As `Engines.reset_cache`.
    pub fn reset_cache(&mut self, number: usize, at_s: f64) -> Result<bool, Refused> {
        self.engine(number)?;
        self.go_to(at_s)?;
        Ok(self.engine(number)?.reset_cache())
    }

    /// As `Engines.slow`, by a factor above 0.
    pub fn slow(&mut self, number: usize, factor: f64, at_s: f64) -> Result<(), Refused> {
        self.engine(number)?;
        self.go_to(at_s)?;
        self.engine(number)?.slow(factor);
        Ok(())
    }

    /// As `Engines.state`.
    pub fn state(&mut self, number: usize) -> Result<State, Refused> {
        Ok(self.engine(number)?.state())
    }

    /// As `Engines.metrics`.
    pub fn metrics(&mut self, number: usize) -> Result<State, Refused> {
        Ok(self.engine(number)?.metrics())
    }

    /// As `Engines.run`: the time reached, and what happened.
    pub fn run(&mut self, until_s: f64, events: Events) -> Result<(f64, Told), Refused> {
        if until_s.is_nan() || until_s < self.now_s {
            return Err(format!("until_s: expected {:?} (the time reached) or later, got {until_s:?}", self.now_s));
        }
        self.told.events = events;
        let mut has_finished = false;
        while !has_finished {
            let due_s = self.next_due_s();
            if due_s > until_s || due_s == f64::INFINITY {
                self.now_s = if until_s == f64::INFINITY { self.now_s } else { until_s };
                break;
            }
            self.now_s = due_s;
            has_finished = self.go_on(due_s, due_s == until_s);
            if due_s == until_s {
                break;
            }
        }
        let mut told = std::mem::take(&mut self.told);
        told.sort();
        Ok((self.now_s, told))
    }

    /// Do what is due at a time; `is_last`: begin no steps. Whether a job finished; then no steps are begun either.
    fn go_on(&mut self, at_s: f64, is_last: bool) -> bool {
        let mut here = std::mem::take(&mut self.here);
        self.take_due(at_s, &mut here);
        let mut has_finished = false;
        for &number in &here {
            if let Some(engine) = self.engines[number].as_mut().filter(|engine| engine.is_stepping()) {
                has_finished |= engine.end_step(at_s, &mut self.told);
            }
        }
        for &number in &here {
            if let Some(engine) =
                self.engines[number].as_mut().filter(|engine| !is_last && !has_finished && engine.due_s() == at_s)
            {
                engine.begin_step(at_s, &mut self.told);
            }
            self.note_due(number);
        }
        self.here = here;
        has_finished
    }

    fn engine(&mut self, number: usize) -> Result<&mut Engine, Refused> {
        let there_is_none = || format!("engine {number}: there is none of this number; join says which there are");
        self.engines.get_mut(number).and_then(Option::as_mut).ok_or_else(there_is_none)
    }

    /// Let the clock be at a time up to which nothing is due, and return it.
    fn go_to(&mut self, at_s: f64) -> Result<f64, Refused> {
        let at_s = at_s + 0.0; // -0.0 is 0.0
        if !(self.now_s <= at_s && at_s < f64::INFINITY) {
            return Err(format!("at_s: expected {:?} (the time reached) or later, got {at_s:?}", self.now_s));
        }
        if self.next_due_s() < at_s {
            return Err(format!("at_s: engines have work before {at_s:?}; run up to it first"));
        }
        self.now_s = at_s;
        Ok(at_s)
    }

    fn note_due(&mut self, number: usize) {
        let due_s = self.engines[number].as_ref().map_or(f64::INFINITY, Engine::due_s);
        if due_s < f64::INFINITY {
            self.due.push(Reverse((due_s.to_bits(), number))); // times are not negative: their bits are in their order
        }
    }

    /// When something is due next, and entries that are out of date dropped.
    fn next_due_s(&mut self) -> f64 {
        while let Some(&Reverse((bits, number))) = self.due.peek() {
            if self.engines[number].as_ref().is_some_and(|engine| engine.due_s().to_bits() == bits) {
                return f64::from_bits(bits);
            }
            self.due.pop();
        }
        f64::INFINITY
    }

    /// Take out the engines at which something is due at a time, in their order.
    fn take_due(&mut self, at_s: f64, here: &mut Vec<usize>) {
        here.clear();
        while self.next_due_s() == at_s {
            here.extend(self.due.pop().map(|Reverse((_, number))| number));
        }
        here.dedup();
    }
}
