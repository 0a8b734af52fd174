//! What is told to whoever decides.

use crate::call::Command;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

/// How a call to an engine failed. The names are those of `kvatlas.serve.proxy.errors.Break`.
#[derive(Debug)]
pub enum Break {
    /// None was to be had; nothing was sent.
    NoConnection,
    /// As many as there may be; nothing was sent.
    AllInUse,
    /// It closed the connection before its answer was whole.
    Reset,
    /// What it sent is no HTTP.
    Garbage,
    /// It said nothing for too long.
    Silent,
}

/// A call to an engine that failed before its answer began.
#[derive(Debug)]
pub struct Fault {
    /// In which way.
    pub how: Break,
    /// In words.
    pub problem: String,
}

impl Fault {
    pub(crate) fn new(how: Break, problem: impl Into<String>) -> Self {
        Self { how, problem: problem.into() }
    }
}

/// Why a request's body is not there.
#[derive(Debug)]
pub enum BodyFault {
    /// It has more bytes than it may.
    TooLarge,
    /// It did not arrive in time.
    TooSlow,
    /// It is not as its headers say.
    Framing,
}

/// A request that arrived.
pub struct Arrival {
    /// GET, POST, ...
    pub method: Method,
    /// Path and query, as they came.
    pub target: String,
    /// Without those that came twice by accident: hyper's view of them.
    pub headers: HeaderMap,
    /// None: not read yet ([`Command::Read`]).
    pub body: Option<Result<Bytes, BodyFault>>,
    /// Its length could be read in two ways.
    pub ambiguous: bool,
    /// Where commands go; without any left the connection is cut.
    pub commands: UnboundedSender<Command>,
}

/// How an answer's passing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All of it reached the client, as far as can be known.
    Whole,
    /// The engine broke it off, or said nothing for too long.
    Broken,
    /// The client went away, took nothing for too long, or was cut off.
    ClientGone,
}

/// An answer that was passed on, or a part of it.
pub struct Passed {
    /// How it ended.
    pub end: End,
    /// The end of its body.
    pub tail: Vec<u8>,
    /// Since the request was sent.
    pub took: Duration,
}

/// What happened to a request.
pub enum News {
    /// It is here. The first news of each.
    Arrived(Arrival),
    /// Its body was read.
    Body(Result<Bytes, BodyFault>),
    /// An engine's answer began; `passing`: it is on its way to the client, otherwise it is held.
    Answered {
        /// The engine's.
        status: StatusCode,
        /// The engine's.
        headers: HeaderMap,
        /// Whether the client gets it.
        passing: bool,
    },
    /// An engine did not answer.
    Failed(Fault),
    /// The first token passed, so long after the request was sent.
    FirstToken(Duration),
    /// The answer's end. The last news of a request whose answer was passed on.
    Passed(Passed),
    /// The client went away before an answer began. The last news.
    Gone,
    /// What an engine said to a request of our own: status and body.
    Fetched(Result<(StatusCode, Bytes), Fault>),
}

/// Is told what happened to which request; must not block.
pub type Post = Arc<dyn Fn(u64, News) + Send + Sync>;
