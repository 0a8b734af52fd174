//! kvatlas-core for Python: buffers in, GIL released, errors mapped; nothing else. `kvatlas.index.native` is how it is used.

mod answers;
mod core;
mod extproc;
mod http;
mod inputs;
mod mailbox;
mod routing;
mod simulation;
mod tokens;

use pyo3::prelude::*;

/// The native core.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("VERSION", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<core::Core>()?;
    module.add_class::<answers::Scores>()?;
    module.add_class::<http::Call>()?;
    module.add_class::<http::Door>()?;
    module.add_class::<extproc::Picker>()?;
    module.add_class::<extproc::Stream>()?;
    module.add_class::<mailbox::Mailbox>()?;
    module.add_class::<routing::History>()?;
    module.add_class::<simulation::SimulatedEngines>()?;
    module.add_class::<tokens::TextEncoder>()?;
    module.add_class::<tokens::SegmentStore>()?;
    module.add_class::<tokens::SegmentEncoder>()?;
    module.add_class::<tokens::EncoderThreads>()?;
    module.add_function(wrap_pyfunction!(core::block_keys, module)?)?;
    module.add_function(wrap_pyfunction!(core::decode, module)?)?;
    module.add_function(wrap_pyfunction!(routing::piece_hashes, module)?)
}
