//! One HTTP request as Envoy tells it over one gRPC stream: messages in, answers and news out. No IO, no waiting, no clock.
//!
//! The request is held until it is whole, because the decision depends on its body; the answer is let pass as it comes.

use crate::answer::Watched;
use crate::held::{HeldBody, Room};
use crate::messages::{self, Kinds, unchanged};
use crate::modes::{Answers, Bodies, answer_bodies, request_bodies};
use crate::news::{Answer, Decision, Headers, News, Question, Refusal, Rules};
use crate::proto::processing_request::Request;
use crate::proto::{HttpBody, HttpHeaders, Metadata, ProcessingRequest, ProcessingResponse};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing came yet.
    Headers,
    /// The request comes.
    Body,
    /// It waits for its decision.
    Asked,
    /// It is on its way to an engine, or has an answer.
    Sent,
    /// Nothing more is to be said.
    Over,
}

/// One request and its answer.
pub struct Exchange {
    rules: Arc<Rules>,
    state: State,
    consumed: Vec<String>,
    question: Question,
    held: HeldBody,
    bodies: Bodies,
    answers: Answers,
    answer: Option<Watched>,
    trailers: bool,
    bodiless: bool,
    /// The client was told that its request goes nowhere.
    pub refused: bool,
    /// Answers to send, the oldest first.
    pub replies: VecDeque<ProcessingResponse>,
    /// What is to be told, the oldest first.
    pub news: Vec<News>,
}

type Said = Result<Option<Question>, String>;

impl Exchange {
    /// Nothing came yet.
    pub fn new(rules: Arc<Rules>, room: Arc<Room>) -> Self {
        Self {
            rules,
            state: State::Headers,
            consumed: Vec::new(),
            question: Question { path: String::new(), headers: Headers::new(), body: None, subset: None },
            held: HeldBody::new(room),
            bodies: Bodies::Duplex,
            answers: Answers::Duplex,
            answer: None,
            trailers: false,
            bodiless: false,
            refused: false,
            replies: VecDeque::new(),
            news: Vec::new(),
        }
    }

    /// Whether nothing more is to be said: the stream can be ended.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Take Envoy's next message; a question has to be answered before the next one. An error: the stream has to fail.
    pub fn receive(&mut self, message: ProcessingRequest, now: Instant) -> Said {
        if self.state == State::Over {
            return Ok(None);
        }
        if self.state == State::Asked {
            return Err(format!("{} came before the request was answered", name(&message)));
        }
        if let Some(Request::RequestHeaders(_)) = message.request {
            return self.request_headers(message);
        }
        if self.state == State::Headers || message.request.is_none() {
            return Err(format!("the first message was {}; configure request_header_mode: SEND", name(&message)));
        }
        match message.request {
            Some(Request::RequestBody(body)) => self.request_body(body),
            Some(Request::RequestTrailers(_)) => Ok(self.request_trailers()),
            Some(response) => self.response(response, message.metadata_context.as_ref(), now).map(|()| None),
            None => Ok(None),
        }
    }

    /// Send the request where it goes.
    pub fn decided(&mut self, mut decision: Decision, now: Instant) {
        self.state = State::Sent;
        let changed = decision.body.take();
        let bodies = if self.bodiless { Bodies::Unseen } else { self.bodies };
        let body = changed.clone().unwrap_or_else(|| self.held.whole());
        let known = body.is_empty() || (changed.is_none() && bodies != Bodies::Duplex);
        let length = if known { None } else { Some(body.len()) };
        let (common, metadata) = messages::send_to(std::mem::take(&mut decision.headers), &self.consumed, length);
        if bodies == Bodies::Buffered {
            self.replies.push_back(messages::request_body(common, metadata, changed));
        } else {
            self.replies.push_back(messages::request_headers(common, metadata));
            match bodies {
                Bodies::Duplex => self.replies.extend(messages::body_chunks(body, !self.trailers)),
                Bodies::Counted => self.replies.extend(messages::counted(self.held.messages, changed)),
                Bodies::Buffered | Bodies::Unseen => (),
            }
        }
        if self.trailers {
            self.replies.push_back(unchanged(Kinds::RequestTrailers));
        }
        self.held.clear();
        self.answer = Some(Watched::new(decision, now));
    }

    /// Tell the client why its request goes nowhere.
    pub fn refuse(&mut self, told: Refusal) {
        self.held.clear();
        self.state = State::Over;
        self.refused = true;
        self.replies.push_back(messages::immediate(told));
    }

    /// The stream ended, in whatever way: give back what is held. Returns what is known of the answer to a request that was sent.
    pub fn close(&mut self, now: Instant) -> Option<Answer> {
        self.held.clear();
        self.state = State::Over;
        self.answer.take().map(|mut answer| answer.known(self.shown(), now))
    }

    /// Whether Envoy would tell an answer's end.
    pub fn shown(&self) -> bool {
        self.answers != Answers::Unseen
    }

    fn request_headers(&mut self, message: ProcessingRequest) -> Said {
        if self.state != State::Headers {
            return Err("request_headers came twice".into());
        }
        if message.observability_mode {
            return Err("nobody looks at answers; configure observability_mode: false".into());
        }
        self.bodies = request_bodies(&message)?;
        self.answers = answer_bodies(&message);
        self.state = State::Body;
        let Some(Request::RequestHeaders(told)) = message.request else { return Ok(None) };
        Ok(self.head(told, message.metadata_context.as_ref()))
    }

    fn head(&mut self, told: HttpHeaders, metadata: Option<&Metadata>) -> Option<Question> {
        let rules = self.rules.clone();
        if told.headers.as_ref().is_some_and(|headers| messages::header_chars(headers) > rules.headers_bytes_max) {
            self.refuse(rules.refusals.headers.clone());
            return None;
        }
        let headers = messages::read_headers(told.headers);
        let Ok(subset) = messages::subset_hint(metadata) else {
            self.refuse(rules.refusals.subset.clone());
            return None;
        };
        let length = length(&headers);
        self.consumed = rules.consumed.iter().filter(|name| headers.contains_key(*name)).cloned().collect();
        self.question = Question { path: path(&headers), headers, body: None, subset };
        if told.end_of_stream || self.bodies == Bodies::Unseen {
            return Some(self.ask(false));
        }
        if length > rules.body_bytes_max {
            self.refuse(rules.refusals.body.clone());
        } else if self.bodies == Bodies::Buffered {
            self.replies.push_back(unchanged(Kinds::RequestHeaders));
        }
        None
    }

    fn request_body(&mut self, body: HttpBody) -> Said {
        if self.state == State::Sent {
            if self.answer.is_none() {
                return Ok(None); // Envoy answered meanwhile
            }
            if self.bodies != Bodies::Unseen {
                return Err("request_body came after the end of the body".into());
            }
            self.replies.push_back(unchanged(Kinds::RequestBody));
            return Ok(None);
        }
        if self.held.size_bytes() + body.body.len() as u64 > self.rules.body_bytes_max {
            self.refuse(self.rules.refusals.body.clone());
        } else if !self.held.add(body.body) {
            self.refuse(self.rules.refusals.held.clone());
        } else if body.end_of_stream || self.bodies == Bodies::Buffered {
            return Ok(Some(self.ask(true)));
        }
        Ok(None)
    }

    fn request_trailers(&mut self) -> Option<Question> {
        if self.state == State::Sent {
            self.replies.push_back(unchanged(Kinds::RequestTrailers));
            return None;
        }
        if self.bodies == Bodies::Buffered {
            // the answer to trailers could not say where the request goes
            self.refuse(self.rules.refusals.empty.clone());
            return None;
        }
        self.trailers = true;
        Some(self.ask(true))
    }

    fn ask(&mut self, with_body: bool) -> Question {
        self.state = State::Asked;
        self.bodiless = !with_body;
        let body = with_body.then(|| self.held.whole());
        let headers = std::mem::take(&mut self.question.headers);
        Question { path: std::mem::take(&mut self.question.path), headers, body, subset: self.question.subset.take() }
    }

    fn response(&mut self, told: Request, metadata: Option<&Metadata>, now: Instant) -> Result<(), String> {
        if self.state == State::Body {
            // an answer of Envoy's own: the client was too slow, say. Nothing is left to decide
            self.held.clear();
            self.state = State::Sent;
        }
        let Some(answer) = &mut self.answer else {
            self.replies.push_back(unchanged(kind(&told)));
            return Ok(());
        };
        let reply = match told {
            Request::ResponseHeaders(headers) => answer.headers(headers, metadata, &self.rules.telling, &mut self.news)?,
            Request::ResponseBody(body) => answer.body(body, self.answers == Answers::Duplex, now, &mut self.news),
            _ => answer.trailers(),
        };
        if answer.whole {
            self.state = State::Over;
        }
        self.replies.push_back(reply);
        Ok(())
    }
}

fn path(headers: &Headers) -> String {
    headers.get(":path").and_then(|target| target.split('?').next()).unwrap_or_default().to_owned()
}

fn length(headers: &Headers) -> u64 {
    let digits = |text: &&String| text.len() < 20 && text.bytes().all(|byte| byte.is_ascii_digit());
    headers.get("content-length").filter(digits).and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn kind(told: &Request) -> Kinds {
    match told {
        Request::RequestHeaders(_) => Kinds::RequestHeaders,
        Request::RequestBody(_) => Kinds::RequestBody,
        Request::RequestTrailers(_) => Kinds::RequestTrailers,
        Request::ResponseHeaders(_) => Kinds::ResponseHeaders,
        Request::ResponseBody(_) => Kinds::ResponseBody,
        Request::ResponseTrailers(_) => Kinds::ResponseTrailers,
    }
}

fn name(message: &ProcessingRequest) -> &'static str {
    match message.request.as_ref().map(kind) {
        None => "None",
        Some(Kinds::RequestHeaders) => "request_headers",
        Some(Kinds::RequestBody) => "request_body",
        Some(Kinds::RequestTrailers) => "request_trailers",
        Some(Kinds::ResponseHeaders) => "response_headers",
        Some(Kinds::ResponseBody) => "response_body",
        Some(Kinds::ResponseTrailers) => "response_trailers",
    }
}
