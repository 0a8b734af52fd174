//! kvatlas-core for Python: buffers in, GIL released, errors mapped; nothing else.

use pyo3::prelude::*;

/// The native core. `kvatlas.index.native` is how it is used.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("VERSION", env!("CARGO_PKG_VERSION"))
}
