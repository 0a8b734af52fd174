//! What the router keeps and hashes, as Python sees it. Microseconds each, so the GIL is kept.

use crate::answers::key_bytes;
use crate::inputs::Keys;
use kvatlas_core::history::{self, Number};
use kvatlas_core::pieces;
use parking_lot::Mutex;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::collections::HashMap;

/// Endpoints at once: a number costs a bit of every block that it holds.
const ENDPOINTS_MAX: Number = 1 << 20;

/// The hashes of a prompt's content in pieces: the bytes of an array of 64-bit integers. `added`: what a piece has besides, by
/// where it starts.
#[pyfunction]
pub fn piece_hashes<'py>(
    py: Python<'py>,
    content: PyBuffer<u8>,
    piece_bytes: usize,
    root: u64,
    added: HashMap<usize, Vec<u8>>,
) -> PyResult<Bound<'py, PyBytes>> {
    if piece_bytes == 0 {
        return Err(PyValueError::new_err("piece_bytes: expected 1 or more"));
    }
    let hashes = pieces::hashes(&content.to_vec(py)?, piece_bytes, root, |start| added.get(&start).map(Vec::as_slice));
    Ok(key_bytes(py, &hashes))
}

/// Which blocks were routed to whom.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct History(Mutex<history::History>);

#[pymethods]
impl History {
    #[new]
    fn new(bytes_max: usize) -> Self {
        Self(Mutex::new(history::History::new(bytes_max)))
    }

    /// How many leading blocks each endpoint got, of those that got any.
    fn matches(&self, hashes: Keys) -> Vec<(Number, usize)> {
        self.0.lock().matches(&hashes.0)
    }

    /// Note that a prompt was routed to an endpoint whose cache holds so many blocks.
    fn record(&self, endpoint: Number, hashes: Keys, capacity_blocks: usize) -> PyResult<()> {
        if endpoint >= ENDPOINTS_MAX {
            return Err(PyValueError::new_err(format!("endpoint: expected a number below {ENDPOINTS_MAX}")));
        }
        self.0.lock().record(endpoint, &hashes.0, capacity_blocks);
        Ok(())
    }

    /// Forget an endpoint.
    fn forget(&self, endpoint: Number) {
        self.0.lock().forget(endpoint);
    }

    /// `(endpoints, blocks, entries, bytes, evicted by capacity, evicted by bytes)`
    fn stats(&self) -> (usize, usize, usize, usize, u64, u64) {
        let stats = self.0.lock().stats();
        let [capacity, bytes] = [stats.evicted_capacity, stats.evicted_bytes];
        (stats.endpoints, stats.blocks, stats.entries, stats.bytes_estimated, capacity, bytes)
    }
}
