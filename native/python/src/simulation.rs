//! Simulated engines, as Python sees them. The GIL is released while time goes on.

use crate::inputs::{Keys, Tokens};
use kvatlas_sim::engine::State;
use kvatlas_sim::engines::{Engines, Refused};
use kvatlas_sim::jobs::Job;
use kvatlas_sim::spec::{Costs, EngineSpec, TierSpec};
use kvatlas_sim::told::{Events, Happening, Told};
use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

/// Engines on one virtual clock.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct SimulatedEngines {
    engines: Mutex<Engines>,
    /// The class of what is told: a tuple with names.
    happening: Py<PyAny>,
    /// What it was, by number.
    kinds: Vec<Py<PyAny>>,
    /// The class of what an engine says of itself: the same.
    state: Py<PyAny>,
}

#[pymethods]
impl SimulatedEngines {
    #[new]
    fn new(happening: Py<PyAny>, kinds: Vec<Py<PyAny>>, state: Py<PyAny>) -> Self {
        Self { engines: Mutex::default(), happening, kinds, state }
    }

    /// Add an engine, of which all has been checked.
    #[allow(clippy::too_many_arguments)]
    fn join(
        &self,
        costs: [f64; 5],
        gpu_blocks: u32,
        block_size_tokens: u64,
        step_tokens_max: u64,
        running_max: usize,
        prefix_caching: bool,
        tiers: Vec<(String, usize, f64, f64)>,
        at_s: f64,
    ) -> PyResult<usize> {
        let [step_s, prefill_token_s, prefill_context_s, decode_request_s, decode_context_s] = costs;
        let costs = Costs { step_s, prefill_token_s, prefill_context_s, decode_request_s, decode_context_s };
        let tier = |(name, blocks, load_block_s, latency_s): (String, _, _, _)| {
            let name = name.into_boxed_str();
            TierSpec { name, blocks, load_block_s, latency_s }
        };
        let tiers = tiers.into_iter().map(tier).collect();
        let spec = EngineSpec { costs, gpu_blocks, block_size_tokens, step_tokens_max, running_max, prefix_caching, tiers };
        self.engines.lock().join(spec, at_s).map_err(refused)
    }

    /// Take an engine away; the ids of its jobs.
    fn leave(&self, engine: usize, at_s: f64) -> PyResult<Vec<i64>> {
        self.engines.lock().leave(engine, at_s).map_err(refused)
    }

    /// Give an engine a job `(id, keys, prompt tokens, output tokens, token ids)`, which has been checked.
    fn add(&self, engine: usize, job: (i64, Keys, u64, u64, Tokens), at_s: f64) -> PyResult<()> {
        let (id, keys, prompt_tokens, output_tokens, token_ids) = job;
        let job = Job::new(id, keys.0, token_ids.0, prompt_tokens, output_tokens);
        self.engines.lock().add(engine, job, at_s).map_err(refused)
    }

    /// Drop a job.
    fn abort(&self, engine: usize, job: i64, at_s: f64) -> PyResult<bool> {
        self.engines.lock().abort(engine, job, at_s).map_err(refused)
    }

    /// Forget what the GPU holds, unless jobs use it.
    fn reset_cache(&self, engine: usize, at_s: f64) -> PyResult<bool> {
        self.engines.lock().reset_cache(engine, at_s).map_err(refused)
    }

    /// Let an engine's steps take so many times as long, which has been checked.
    fn slow(&self, engine: usize, factor: f64, at_s: f64) -> PyResult<()> {
        self.engines.lock().slow(engine, factor, at_s).map_err(refused)
    }

    /// Go on up to a time, or until a job finishes; the time reached, and what happened.
    fn run<'py>(&self, py: Python<'py>, until_s: f64, events: usize) -> PyResult<(f64, Bound<'py, PyList>)> {
        let events = match events {
            0 => Events::Nothing,
            1 => Events::Each,
            _ => Events::Frames,
        };
        let (now_s, told) = py.detach(|| self.engines.lock().run(until_s, events)).map_err(refused)?;
        Ok((now_s, self.tell(py, &told)?))
    }

    /// How busy an engine is.
    fn state<'py>(&self, py: Python<'py>, engine: usize) -> PyResult<Bound<'py, PyAny>> {
        let state = self.engines.lock().state(engine).map_err(refused)?;
        self.as_state(py, state)
    }

    /// How busy it was when its last step ended.
    fn metrics<'py>(&self, py: Python<'py>, engine: usize) -> PyResult<Bound<'py, PyAny>> {
        let state = self.engines.lock().metrics(engine).map_err(refused)?;
        self.as_state(py, state)
    }
}

impl SimulatedEngines {
    fn as_state<'py>(&self, py: Python<'py>, state: State) -> PyResult<Bound<'py, PyAny>> {
        let State { waiting, running, blocks_used, cached_blocks, step_ends_s, preemptions, busy_s } = state;
        let fields = (waiting, running, blocks_used, cached_blocks, step_ends_s, preemptions, busy_s);
        py.get_type::<PyTuple>().call_method1("__new__", (&self.state, fields))
    }

    fn tell<'py>(&self, py: Python<'py>, told: &Told) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        if told.happenings.is_empty() {
            return Ok(list);
        }
        let make = py.get_type::<PyTuple>().getattr("__new__")?;
        let (no_keys, no_payload) = (PyTuple::empty(py), PyBytes::new(py, &[]));
        for happening in &told.happenings {
            let Happening { at_s, kind, engine, job, first, many, tier, ref keys, ref payload } = *happening;
            let keys = match &told.keys[keys.clone()] {
                [] => no_keys.clone().into_any(),
                keys => PyList::new(py, keys)?.into_any(),
            };
            let payload = if payload.is_empty() { no_payload.clone() } else { PyBytes::new(py, payload) };
            let fields = (at_s, &self.kinds[kind as usize], engine, job, first, many, tier, keys, payload);
            list.append(make.call1((&self.happening, fields))?)?;
        }
        Ok(list)
    }
}

fn refused(reason: Refused) -> PyErr {
    PyValueError::new_err(reason)
}
