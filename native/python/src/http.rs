//! The proxy's data plane for Python. News become letters: `(number of the request, kind, ...)`, see `_native.pyi`.

use crate::mailbox::{Letter, Mailbox};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use kvatlas_http::call::{Command, Forward};
use kvatlas_http::headers::{Dropped, Pairs};
use kvatlas_http::limits::Limits;
use kvatlas_http::news::{BodyFault, Break, End, Fault, News};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

fn bad(field: &str, problem: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(format!("{field}: {problem}"))
}

fn name(text: &str) -> PyResult<HeaderName> {
    HeaderName::from_bytes(text.as_bytes()).map_err(|error| bad("headers", format_args!("{text:?}: {error}")))
}

fn names(texts: Vec<String>) -> PyResult<Vec<HeaderName>> {
    texts.iter().map(|text| name(text)).collect()
}

/// Headers as Python has them; values are latin-1 there.
fn pairs(given: Vec<(String, String)>) -> PyResult<Pairs> {
    given
        .into_iter()
        .map(|(key, text)| {
            let bytes: Option<Vec<u8>> = text.chars().map(|one| u8::try_from(one).ok()).collect();
            let value = bytes.and_then(|bytes| HeaderValue::from_bytes(&bytes).ok());
            Ok((name(&key)?, value.ok_or_else(|| bad("headers", format_args!("the value of {key} cannot be sent")))?))
        })
        .collect()
}

fn text<'py>(py: Python<'py>, bytes: &[u8]) -> Bound<'py, PyString> {
    match std::str::from_utf8(bytes) {
        Ok(ascii) if ascii.is_ascii() => PyString::new(py, ascii),
        _ => PyString::new(py, &bytes.iter().map(|byte| char::from(*byte)).collect::<String>()),
    }
}

/// By lower-case name; of equal names the values, joined as RFC 9110 section 5.3 says.
fn by_name<'py>(py: Python<'py>, headers: &HeaderMap) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    for key in headers.keys() {
        let mut values = headers.get_all(key).iter();
        let first = values.next().map_or(&b""[..], HeaderValue::as_bytes);
        let joined = values.fold(None, |all: Option<Vec<u8>>, value| {
            let mut all = all.unwrap_or_else(|| first.to_vec());
            all.extend_from_slice(b", ");
            all.extend_from_slice(value.as_bytes());
            Some(all)
        });
        found.set_item(key.as_str(), text(py, joined.as_deref().unwrap_or(first)))?;
    }
    Ok(found)
}

/// `(how, problem)`; how: a value of `kvatlas.serve.proxy.errors.Break`
type FaultTuple = (&'static str, String);

fn fault(fault: Fault) -> FaultTuple {
    let how = match fault.how {
        Break::NoConnection => "no_connection",
        Break::AllInUse => "all_in_use",
        Break::Reset => "reset",
        Break::Garbage => "garbage",
        Break::Silent => "silent",
    };
    (how, fault.problem)
}

/// `(body, what is wrong with it)`
fn body(py: Python<'_>, read: Option<Result<Bytes, BodyFault>>) -> (Option<Py<PyBytes>>, Option<&'static str>) {
    match read {
        None => (None, None),
        Some(Ok(bytes)) => (Some(PyBytes::new(py, &bytes).unbind()), None),
        Some(Err(BodyFault::TooLarge)) => (None, Some("too_large")),
        Some(Err(BodyFault::TooSlow)) => (None, Some("too_slow")),
        Some(Err(BodyFault::Framing)) => (None, Some("framing")),
    }
}

fn letter(number: u64, news: News) -> Letter {
    Box::new(move |py| {
        let content = match news {
            News::Arrived(arrival) => {
                let call = Call { commands: arrival.commands, number };
                let (body, wrong) = body(py, arrival.body);
                let asked = (arrival.method.as_str(), text(py, arrival.target.as_bytes()), by_name(py, &arrival.headers)?);
                (number, "arrived", call, asked, body, wrong, arrival.ambiguous).into_pyobject(py)
            }
            News::Body(read) => {
                let (body, wrong) = body(py, Some(read));
                (number, "body", body, wrong).into_pyobject(py)
            }
            News::Answered { status, headers, passing } => {
                (number, "answered", status.as_u16(), by_name(py, &headers)?, passing).into_pyobject(py)
            }
            News::Failed(failure) => (number, "failed", fault(failure)).into_pyobject(py),
            News::FirstToken(took) => (number, "first_token", took.as_secs_f64()).into_pyobject(py),
            News::Passed(passed) => {
                let end = match passed.end {
                    End::Whole => "whole",
                    End::Broken => "broken",
                    End::ClientGone => "client_gone",
                };
                (number, "passed", end, PyBytes::new(py, &passed.tail), passed.took.as_secs_f64()).into_pyobject(py)
            }
            News::Gone => (number, "gone").into_pyobject(py),
            News::Fetched(Ok((status, body))) => {
                (number, "fetched", status.as_u16(), PyBytes::new(py, &body)).into_pyobject(py)
            }
            News::Fetched(Err(failure)) => (number, "failed", fault(failure)).into_pyobject(py),
        };
        Ok(content?.into_any().unbind())
    })
}

/// One client's request. Dropped before its answer has ended, its connection is cut.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct Call {
    commands: UnboundedSender<Command>,
    #[pyo3(get)]
    number: u64,
}

impl Call {
    /// Say what is to be done. Nobody listens any more where the client went away, which is told in another way.
    fn say(&self, command: Command) {
        let _ = self.commands.send(command);
    }
}

#[pymethods]
impl Call {
    /// Read the body: a letter `body` comes.
    fn read(&self, bytes_max: u64) {
        self.say(Command::Read { bytes_max });
    }

    /// Send it to an engine: a letter `answered` or `failed` comes.
    #[allow(clippy::too_many_arguments)]
    fn forward(
        &self,
        authority: String,
        target: String,
        routing: Vec<(String, String)>,
        body: Option<&[u8]>,
        reply: Vec<(String, String)>,
        hidden: Vec<String>,
    ) -> PyResult<()> {
        let (routing, reply, hidden) = (pairs(routing)?, pairs(reply)?, names(hidden)?);
        let body = body.map(Bytes::copy_from_slice);
        self.say(Command::Forward(Box::new(Forward { authority, target, routing, body, reply, hidden })));
        Ok(())
    }

    /// Pass on the answer that is held.
    fn pass_on(&self) {
        self.say(Command::Pass);
    }

    /// Answer it. No further letter comes.
    fn respond(&self, status: u16, headers: Vec<(String, String)>, body: &[u8], close: bool) -> PyResult<()> {
        let status = StatusCode::from_u16(status).map_err(|error| bad("status", error))?;
        self.say(Command::Respond { status, headers: pairs(headers)?, body: Bytes::copy_from_slice(body), close });
        Ok(())
    }

    /// Close its connection at once.
    fn cut(&self) {
        self.say(Command::Cut);
    }
}

/// A listener with its clients' connections, in threads that never take the interpreter.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct Door(kvatlas_http::door::Door);

#[pymethods]
impl Door {
    /// Listen at an IP address. `times`: seconds, in the order of `kvatlas_http::limits::Limits`.
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        host: &str,
        port: u16,
        share: bool,
        threads: usize,
        connections_max: usize,
        engine_connections_max: usize,
        times: [f64; 6],
        dropped: (Vec<String>, Vec<String>),
        mailbox: &Mailbox,
        ticket: u64,
    ) -> PyResult<Self> {
        let address = SocketAddr::new(host.parse().map_err(|error| bad("host", error))?, port);
        let [client, keep_alive, connect, first_byte, idle, engine_keep_alive] = times;
        let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).map_err(|error| bad("times", error));
        let limits = Limits {
            connections_max,
            client: seconds(client)?,
            keep_alive: seconds(keep_alive)?,
            engine_connections_max,
            connect: seconds(connect)?,
            first_byte: seconds(first_byte)?,
            idle: seconds(idle)?,
            engine_keep_alive: seconds(engine_keep_alive)?,
        };
        let dropped = Dropped { requests: names(dropped.0)?, answers: names(dropped.1)? };
        let post = mailbox.post();
        let told = Arc::new(move |number, news| post.put(ticket, letter(number, news)));
        py.detach(|| kvatlas_http::door::Door::open(address, share, limits, dropped, threads.max(1), told))
            .map(Self)
            .map_err(|error| PyOSError::new_err((error.raw_os_error().unwrap_or(0), error.to_string())))
    }

    /// Where it listens.
    fn address(&self) -> (String, u16) {
        (self.0.address.ip().to_string(), self.0.address.port())
    }

    /// Take no new connections; close the others as they become idle.
    fn stop_accepting(&self) {
        self.0.stop_accepting();
    }

    /// Cut what is left, and end its threads.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }

    /// GET something from an engine: a letter `fetched` or `failed` comes, of the number that is returned.
    fn fetch(&self, authority: String, target: &str, headers: Vec<(String, String)>, bytes_max: usize) -> PyResult<u64> {
        self.0.fetch(authority, target, &pairs(headers)?, bytes_max).map_err(|error| bad("target", error))
    }
}
