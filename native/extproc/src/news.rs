//! What is told to whoever decides, and what is answered.

use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Headers to set, in place of any that there are.
pub type Pairs = Vec<(String, Bytes)>;

/// Headers by lower-case name; several of one name are joined with commas.
pub type Headers = HashMap<String, String>;

/// A request that goes nowhere, as its client is told.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// HTTP's.
    pub status: i32,
    /// Its headers.
    pub headers: Pairs,
    /// Its body.
    pub body: Bytes,
}

/// What is told without asking anybody.
#[derive(Clone, Debug)]
pub struct Refusals {
    /// More streams than there may be.
    pub streams: Refusal,
    /// Headers that are too long.
    pub headers: Refusal,
    /// A body that is too long.
    pub body: Refusal,
    /// Too many bodies are held already.
    pub held: Refusal,
    /// A body that never came.
    pub empty: Refusal,
    /// A subset hint that is none.
    pub subset: Refusal,
}

/// What streams may cost, and what all of them share.
#[derive(Clone, Debug)]
pub struct Rules {
    /// In progress at a time.
    pub streams_max: usize,
    /// Of one body.
    pub body_bytes_max: u64,
    /// Of one request's headers.
    pub headers_bytes_max: usize,
    /// Of all bodies that are held.
    pub held_bytes_max: u64,
    /// Headers of a client that are never passed on, by lower-case name.
    pub consumed: Vec<String>,
    /// Headers of an answer, by lower-case name: with one of them, all are told.
    pub telling: Vec<String>,
    /// What is told without asking anybody.
    pub refusals: Refusals,
}

/// What has to be decided before a stream goes on.
#[derive(Debug, PartialEq)]
pub struct Question {
    /// Without its query.
    pub path: String,
    /// The client's.
    pub headers: Headers,
    /// None: there is none, or Envoy does not show it.
    pub body: Option<Bytes>,
    /// The addresses that the gateway allows.
    pub subset: Option<Vec<String>>,
}

/// Where a request goes.
#[derive(Debug, Default)]
pub struct Decision {
    /// Headers to set on the request; one is the destination.
    pub headers: Pairs,
    /// In place of the body that came.
    pub body: Option<Bytes>,
    /// Headers to set on the answer, by the address of whoever serves it; the first is the target.
    pub replies: Vec<(String, Pairs)>,
    /// Headers of the answer that are not for the client.
    pub hidden: Vec<String>,
}

/// What is to be done with a request.
#[derive(Debug)]
pub enum Command {
    /// Send it on.
    Send(Box<Decision>),
    /// Tell its client why it goes nowhere.
    Refuse(Refusal),
}

/// How a stream ended. The names are those of the metric `kvatlas_extproc_ends`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// All was said.
    Done,
    /// The client was told that its request goes nowhere.
    Refused,
    /// Envoy had no more to tell.
    EnvoyClosed,
    /// Envoy sent what it should not.
    ProtocolError(String),
    /// Envoy broke it off, or this end stopped.
    Cancelled,
    /// It could not be served.
    Failed,
}

/// What is known of a request's answer.
#[derive(Debug, PartialEq)]
pub struct Answer {
    /// Its end was seen.
    pub whole: bool,
    /// The engine's, or Envoy's own.
    pub status: Option<u16>,
    /// Envoy would have told its end.
    pub shown: bool,
    /// It is a stream of events.
    pub events: bool,
    /// The end of its body; empty where there is nothing to be read.
    pub tail: Vec<u8>,
    /// Since the request was sent.
    pub took: Duration,
}

/// What happened to a request.
#[derive(Debug)]
pub enum News {
    /// It has to be decided. Its first news.
    Asked(Question, oneshot::Sender<Command>),
    /// The answer's headers came, and there is something to be learnt from them.
    Answered {
        /// The answer's.
        headers: Headers,
        /// Who answers, where that is not the target.
        served: Option<String>,
    },
    /// The first token came, so long after the request was sent.
    FirstToken(Duration),
    /// The last news of each stream, and the only one where nobody had to be asked.
    Ended {
        /// In which way.
        how: How,
        /// None where it was not sent.
        answer: Option<Answer>,
    },
    /// All connections have ended, after [`crate::door::Door::stop_accepting`].
    Idle,
}

/// Is told what happened to which stream; must not block.
pub type Post = Arc<dyn Fn(u64, News) + Send + Sync>;
