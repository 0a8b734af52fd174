//! The engine's answer while it passes: when its first token came, and how it ended.

use crate::messages::{self, Kinds, unchanged};
use crate::news::{Answer, Decision, News};
use crate::proto::{HttpBody, HttpHeaders, Metadata, ProcessingResponse};
use kvatlas_http::tap::Tap;
use std::time::Instant;

/// What a status counts as that is none.
const NO_STATUS: u16 = 500;

/// Takes the messages of a response.
pub struct Watched {
    decision: Decision,
    began: Instant,
    status: Option<u16>,
    /// None: the answer cannot be read, or nothing is to be learnt from it.
    tap: Option<Tap>,
    /// Its end came.
    pub whole: bool,
}

impl Watched {
    /// The answer to a request that is sent now.
    pub fn new(decision: Decision, now: Instant) -> Self {
        Self { decision, began: now, status: None, tap: None, whole: false }
    }

    /// Take the status and headers. `telling`: names of headers that somebody wants to know.
    pub fn headers(
        &mut self,
        told: HttpHeaders,
        metadata: Option<&Metadata>,
        telling: &[String],
        news: &mut Vec<News>,
    ) -> Result<ProcessingResponse, String> {
        if self.status.is_some() {
            return Err("response_headers came twice".into());
        }
        let headers = messages::read_headers(told.headers);
        let digits = headers.get(":status").filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        let status = digits.and_then(|text| text.parse().ok()).unwrap_or(NO_STATUS);
        self.status = Some(status);
        if status < 300 && !headers.contains_key("content-encoding") {
            let events = headers.get("content-type").is_some_and(|kind| kind.starts_with("text/event-stream"));
            self.tap = Some(Tap::new(events));
        }
        self.whole = told.end_of_stream;
        let served = messages::served_by(&headers, metadata);
        let found = served.as_ref().and_then(|served| self.decision.replies.iter().position(|(one, _)| one == served));
        let set = self.decision.replies.get_mut(found.unwrap_or(0)).map(|(_, set)| std::mem::take(set));
        let mut removed = std::mem::take(&mut self.decision.hidden);
        removed.retain(|name| headers.contains_key(name));
        let moved = found.is_some_and(|position| position > 0);
        if moved || telling.iter().any(|name| headers.contains_key(name)) {
            news.push(News::Answered { headers, served: served.filter(|_| moved) });
        }
        Ok(messages::response_headers(set.unwrap_or_default(), removed))
    }

    /// Take a piece of the body. `send_back`: whether Envoy waits for it.
    pub fn body(&mut self, body: HttpBody, send_back: bool, now: Instant, news: &mut Vec<News>) -> ProcessingResponse {
        if self.tap.as_mut().is_some_and(|tap| tap.feed(&body.body)) {
            news.push(News::FirstToken(now - self.began));
        }
        self.whole |= body.end_of_stream;
        if send_back { messages::answer_chunk(body.body, body.end_of_stream) } else { unchanged(Kinds::ResponseBody) }
    }

    /// Take the end of an answer that has trailers.
    pub fn trailers(&mut self) -> ProcessingResponse {
        self.whole = true;
        unchanged(Kinds::ResponseTrailers)
    }

    /// What is known of it. `shown`: whether Envoy would tell its end.
    pub fn known(&mut self, shown: bool, now: Instant) -> Answer {
        Answer {
            whole: self.whole,
            status: self.status,
            shown,
            events: self.tap.as_ref().is_some_and(|tap| tap.events),
            tail: self.tap.take().map_or_else(Vec::new, |mut tap| tap.take()),
            took: now - self.began,
        }
    }
}
