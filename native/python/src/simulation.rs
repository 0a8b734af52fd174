//! Simulated engines, as Python sees them. The GIL is released while time goes on.

use crate::inputs::Keys;
use kvatlas_sim::engines::{Engines, Refused};
use kvatlas_sim::spec::{Costs, EngineSpec, TierSpec};
use kvatlas_sim::told::{Happening, Told};
use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

/// As `kvatlas.sim.engines.EngineState`.
type State = (usize, usize, usize, usize, Option<f64>, u64, f64);

/// Engines on one virtual clock.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct SimulatedEngines {
    engines: Mutex<Engines>,
    /// The class of what is told: a tuple with names.
    happening: Py<PyAny>,
    /// What it was, by number.
    kinds: Vec<Py<PyAny>>,
}

#[pymethods]
impl SimulatedEngines {
    #[new]
    fn new(happening: Py<PyAny>, kinds: Vec<Py<PyAny>>) -> Self {
        Self { engines: Mutex::default(), happening, kinds }
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
        tiers: Vec<(usize, f64, f64)>,
        at_s: f64,
    ) -> PyResult<usize> {
        let [step_s, prefill_token_s, prefill_context_s, decode_request_s, decode_context_s] = costs;
        let costs = Costs { step_s, prefill_token_s, prefill_context_s, decode_request_s, decode_context_s };
        let tier = |(blocks, load_block_s, latency_s)| TierSpec { blocks, load_block_s, latency_s };
        let tiers = tiers.into_iter().map(tier).collect();
        let spec = EngineSpec { costs, gpu_blocks, block_size_tokens, step_tokens_max, running_max, prefix_caching, tiers };
        self.engines.lock().join(spec, at_s).map_err(refused)
    }

    /// Take an engine away; the ids of its jobs.
    fn leave(&self, engine: usize, at_s: f64) -> PyResult<Vec<i64>> {
        self.engines.lock().leave(engine, at_s).map_err(refused)
    }

    /// Give an engine a job, which has been checked.
    fn add(&self, engine: usize, job: i64, keys: Keys, prompt_tokens: u64, output_tokens: u64, at_s: f64) -> PyResult<()> {
        self.engines.lock().add(engine, job, keys.0, prompt_tokens, output_tokens, at_s).map_err(refused)
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
    fn run<'py>(&self, py: Python<'py>, until_s: f64, events: bool) -> PyResult<(f64, Bound<'py, PyList>)> {
        let (now_s, told) = py.detach(|| self.engines.lock().run(until_s, events)).map_err(refused)?;
        Ok((now_s, self.tell(py, &told)?))
    }

    /// How busy an engine is.
    fn state(&self, engine: usize) -> PyResult<State> {
        self.engines.lock().state(engine).map(fields).map_err(refused)
    }

    /// How busy it was when its last step ended.
    fn metrics(&self, engine: usize) -> PyResult<State> {
        self.engines.lock().metrics(engine).map(fields).map_err(refused)
    }
}

fn fields(state: kvatlas_sim::engine::State) -> State {
    let kvatlas_sim::engine::State { waiting, running, blocks_used, cached_blocks, step_ends_s, preemptions, busy_s } = state;
    (waiting, running, blocks_used, cached_blocks, step_ends_s, preemptions, busy_s)
}

impl SimulatedEngines {
    fn tell<'py>(&self, py: Python<'py>, told: &Told) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        if told.happenings.is_empty() {
            return Ok(list);
        }
        let make = py.get_type::<PyTuple>().getattr("__new__")?;
        let none = PyTuple::empty(py);
        for happening in &told.happenings {
            let Happening { at_s, kind, engine, job, first, many, tier, ref keys } = *happening;
            let keys = match &told.keys[keys.clone()] {
                [] => none.clone().into_any(),
                keys => PyList::new(py, keys)?.into_any(),
            };
            let fields = (at_s, &self.kinds[kind as usize], engine, job, first, many, tier, keys);
            list.append(make.call1((&self.happening, fields))?)?;
        }
        Ok(list)
    }
}

fn refused(reason: Refused) -> PyErr {
    PyValueError::new_err(reason)
}
