//! What threads of Rust have to tell an event loop: they never take the interpreter for it, the loop takes all letters at once.

use parking_lot::Mutex;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// A letter's content, made into a Python value when it is taken.
pub type Letter = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;

struct Waiting {
    letters: Vec<(u64, Letter)>,
    /// One byte lies in the pipe: the loop will come.
    called: bool,
    bell: PipeWriter,
    heard: PipeReader,
}

/// Where letters are put: cheap to clone, used by any thread.
#[derive(Clone)]
pub struct Post(Arc<Mutex<Waiting>>);

impl Post {
    /// Put a letter for whom the ticket names.
    pub fn put(&self, ticket: u64, letter: Letter) {
        let mut waiting = self.0.lock();
        waiting.letters.push((ticket, letter));
        if !waiting.called {
            // Fails when the reading end is gone; it is not: both ends live and die together.
            waiting.called = waiting.bell.write(&[1]).is_ok();
        }
    }
}

/// Letters of Rust's threads for one event loop, which watches `fileno()` and calls `take()` when it can be read.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct Mailbox(Post);

#[pymethods]
impl Mailbox {
    #[new]
    fn new() -> PyResult<Self> {
        let (heard, bell) = pipe().map_err(|error| PyOSError::new_err(error.to_string()))?;
        let waiting = Waiting { letters: Vec::new(), called: false, bell, heard };
        Ok(Self(Post(Arc::new(Mutex::new(waiting)))))
    }

    /// The descriptor that can be read while letters wait.
    fn fileno(&self) -> i32 {
        self.0.0.lock().heard.as_raw_fd()
    }

    /// Take all letters: `(ticket, content)`, in the order in which they were put.
    fn take(&self, py: Python<'_>) -> PyResult<Vec<(u64, Py<PyAny>)>> {
        let letters = {
            let mut waiting = self.0.0.lock();
            if waiting.called {
                waiting.heard.read_exact(&mut [0])?;
                waiting.called = false;
            }
            std::mem::take(&mut waiting.letters)
        };
        letters.into_iter().map(|(ticket, letter)| Ok((ticket, letter(py)?))).collect()
    }
}

impl Mailbox {
    /// Where letters for it are put.
    pub fn post(&self) -> Post {
        self.0.clone()
    }
}
