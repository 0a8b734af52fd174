//! The endpoint picker's gRPC for Python. News become letters: `(number of the stream, kind, ...)`, see `_native.pyi`.

use crate::mailbox::{Letter, Mailbox};
use bytes::Bytes;
use kvatlas_extproc::news::{Answer, Command, Decision, Headers, How, News, Pairs, Refusal, Refusals, Rules};
use parking_lot::Mutex;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyFrozenSet};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::oneshot;

type TextPairs = Vec<(String, String)>;
/// `(status, headers, body)`
type RefusalTuple = (i32, TextPairs, Vec<u8>);

/// Headers as Python has them; values are latin-1 on the wire.
fn pairs(given: TextPairs) -> Pairs {
    given
        .into_iter()
        .map(|(name, value)| {
            let plain = value.is_ascii();
            let bytes = if plain { value.into_bytes() } else { value.chars().map(latin1).collect() };
            (name, Bytes::from(bytes))
        })
        .collect()
}

fn latin1(one: char) -> u8 {
    u8::try_from(one).unwrap_or(b'?')
}

fn refusal((status, headers, body): RefusalTuple) -> Refusal {
    Refusal { status, headers: pairs(headers), body: body.into() }
}

fn by_name<'py>(py: Python<'py>, headers: &Headers) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    for (name, value) in headers {
        found.set_item(name, value)?;
    }
    Ok(found)
}

/// `(how, problem)`; how: a label of the metric `kvatlas_extproc_ends`
fn end(how: How) -> (&'static str, Option<String>) {
    match how {
        How::Done => ("done", None),
        How::Refused => ("refused", None),
        How::EnvoyClosed => ("envoy_closed", None),
        How::ProtocolError(problem) => ("protocol_error", Some(problem)),
        How::Cancelled => ("cancelled", None),
        How::Failed => ("failed", None),
    }
}

/// `(whole, status, shown, events, tail, seconds since it was sent)`
fn answer(py: Python<'_>, answer: Answer) -> (bool, Option<u16>, bool, bool, Py<PyBytes>, f64) {
    let tail = PyBytes::new(py, &answer.tail).unbind();
    (answer.whole, answer.status, answer.shown, answer.events, tail, answer.took.as_secs_f64())
}

fn letter(number: u64, news: News) -> Letter {
    Box::new(move |py| {
        let content = match news {
            News::Asked(question, commands) => {
                let stream = Stream(Mutex::new(Some(commands)));
                let body = question.body.map(|body| PyBytes::new(py, &body).unbind());
                let subset = question.subset.map(|all| PyFrozenSet::new(py, all)).transpose()?;
                (number, "asked", stream, question.path, by_name(py, &question.headers)?, body, subset).into_pyobject(py)
            }
            News::Answered { headers, served } => (number, "answered", by_name(py, &headers)?, served).into_pyobject(py),
            News::FirstToken(took) => (number, "first_token", took.as_secs_f64()).into_pyobject(py),
            News::Ended { how, answer: known } => {
                let (how, problem) = end(how);
                (number, "ended", how, problem, known.map(|known| answer(py, known))).into_pyobject(py)
            }
            News::Idle => (number, "idle").into_pyobject(py),
        };
        Ok(content?.into_any().unbind())
    })
}

/// One stream that waits for its decision. Dropped without one, it fails.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct Stream(Mutex<Option<oneshot::Sender<Command>>>);

impl Stream {
    /// Say what is to be done, once. Nobody listens any more where the stream has ended, which is told in another way.
    fn say(&self, command: Command) {
        if let Some(commands) = self.0.lock().take() {
            let _ = commands.send(command);
        }
    }
}

#[pymethods]
impl Stream {
    /// Send the request on.
    fn send(&self, headers: TextPairs, body: Option<&[u8]>, replies: Vec<(String, TextPairs)>, hidden: Vec<String>) {
        let replies = replies.into_iter().map(|(served, set)| (served, pairs(set))).collect();
        let body = body.map(Bytes::copy_from_slice);
        self.say(Command::Send(Box::new(Decision { headers: pairs(headers), body, replies, hidden })));
    }

    /// Tell the client why its request goes nowhere.
    fn refuse(&self, status: i32, headers: TextPairs, body: Vec<u8>) {
        self.say(Command::Refuse(refusal((status, headers, body))));
    }
}

/// The endpoint picker's port, served by threads that never take the interpreter.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct Picker(kvatlas_extproc::door::Door);

#[pymethods]
impl Picker {
    /// Take a port at an IP address.
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        host: &str,
        port: u16,
        threads: usize,
        streams_max: usize,
        body_bytes_max: u64,
        headers_bytes_max: usize,
        held_bytes_max: u64,
        consumed: Vec<String>,
        telling: Vec<String>,
        refusals: [RefusalTuple; 6],
        mailbox: &Mailbox,
        ticket: u64,
    ) -> PyResult<Self> {
        let host = host.parse().map_err(|error| PyValueError::new_err(format!("host: {error}")))?;
        let [streams, headers, body, held, empty, subset] = refusals.map(refusal);
        let refusals = Refusals { streams, headers, body, held, empty, subset };
        let rules = Rules { streams_max, body_bytes_max, headers_bytes_max, held_bytes_max, consumed, telling, refusals };
        let post = mailbox.post();
        let told = Arc::new(move |number, news| post.put(ticket, letter(number, news)));
        py.detach(|| kvatlas_extproc::door::Door::open(SocketAddr::new(host, port), rules, threads.max(1), told))
            .map(Self)
            .map_err(|error| PyOSError::new_err((error.raw_os_error().unwrap_or(0), error.to_string())))
    }

    /// The port that it has.
    fn port(&self) -> u16 {
        self.0.address.port()
    }

    /// Take connections.
    fn serve(&self) {
        self.0.serve();
    }

    /// Let health checks say whether requests should be sent here.
    fn set_ready(&self, ready: bool) {
        self.0.set_ready(ready);
    }

    /// Streams in progress.
    fn streams(&self) -> usize {
        self.0.streams()
    }

    /// Of bodies that are held.
    fn held_bytes(&self) -> u64 {
        self.0.held_bytes()
    }

    /// Take no new streams: a letter `idle` comes when the others have ended.
    fn stop_accepting(&self) {
        self.0.stop_accepting();
    }

    /// Cut what is left, and end its threads.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}
