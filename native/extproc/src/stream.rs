//! One stream: Envoy's messages into an exchange, and its answers back. Runs where its connection does, without a task of its own.

use crate::door::Shared;
use crate::exchange::Exchange;
use crate::news::{Command, How, News};
use crate::proto::{ProcessingRequest, ProcessingResponse};
use prost::DecodeError;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Instant;
use tokio::sync::oneshot;
use tokio_stream::Stream;
use tonic::{Code, Status, Streaming};

/// Messages as they come; what is none is told as such.
pub type Requests = Streaming<Result<ProcessingRequest, DecodeError>>;

/// The answers to one stream.
pub struct Answering {
    shared: Arc<Shared>,
    number: u64,
    requests: Requests,
    exchange: Exchange,
    /// While somebody is asked.
    waiting: Option<oneshot::Receiver<Command>>,
    ended: bool,
}

impl Answering {
    /// Begin with a stream; beyond `streams_max` it is refused.
    pub fn new(shared: Arc<Shared>, requests: Requests) -> Self {
        let number = shared.next_number();
        let mut exchange = Exchange::new(shared.rules.clone(), shared.room.clone());
        if shared.streams.fetch_add(1, Ordering::Relaxed) >= shared.rules.streams_max {
            exchange.refuse(shared.rules.refusals.streams.clone());
        }
        Self { shared, number, requests, exchange, waiting: None, ended: false }
    }

    fn tell(&self, news: News) {
        (self.shared.post)(self.number, news);
    }

    /// Tell that nothing more comes. Later calls do nothing.
    fn end(&mut self, how: How) {
        if !self.ended {
            self.ended = true;
            self.waiting = None;
            let answer = self.exchange.close(Instant::now());
            self.tell(News::Ended { how, answer });
        }
    }

    fn take(&mut self, message: ProcessingRequest) -> Result<(), String> {
        let question = self.exchange.receive(message, Instant::now())?;
        for news in std::mem::take(&mut self.exchange.news) {
            self.tell(news);
        }
        if let Some(question) = question {
            let (sender, receiver) = oneshot::channel();
            self.waiting = Some(receiver);
            self.tell(News::Asked(question, sender));
        }
        Ok(())
    }

    fn fail(&mut self, problem: String) -> Poll<Option<Result<ProcessingResponse, Status>>> {
        self.end(How::ProtocolError(problem.clone()));
        Poll::Ready(Some(Err(Status::invalid_argument(problem))))
    }
}

impl Stream for Answering {
    type Item = Result<ProcessingResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if this.exchange.is_over() && !this.ended {
                this.end(if this.exchange.refused { How::Refused } else { How::Done });
            }
            if let Some(reply) = this.exchange.replies.pop_front() {
                return Poll::Ready(Some(Ok(reply)));
            }
            if this.ended {
                return Poll::Ready(None);
            }
            if let Some(waiting) = &mut this.waiting {
                let command = ready!(Pin::new(waiting).poll(context));
                this.waiting = None;
                match command {
                    Ok(Command::Send(decision)) => this.exchange.decided(*decision, Instant::now()),
                    Ok(Command::Refuse(told)) => this.exchange.refuse(told),
                    Err(_) => {
                        this.end(How::Failed);
                        return Poll::Ready(Some(Err(Status::unavailable("nobody decides here any more"))));
                    }
                }
                continue;
            }
            match ready!(Pin::new(&mut this.requests).poll_next(context)) {
                Some(Ok(Ok(message))) => {
                    if let Err(problem) = this.take(message) {
                        return this.fail(problem);
                    }
                }
                Some(Ok(Err(_))) => return this.fail("this is no ProcessingRequest".into()),
                Some(Err(status)) => {
                    let too_long = status.code() == Code::OutOfRange;
                    this.end(if too_long { How::Failed } else { How::Cancelled });
                    return Poll::Ready(Some(Err(status)));
                }
                None => this.end(How::EnvoyClosed),
            }
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.end(How::Cancelled);
        self.shared.streams.fetch_sub(1, Ordering::Relaxed);
    }
}
