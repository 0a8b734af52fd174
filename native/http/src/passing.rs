//! An engine's answer on its way to the client, piece by piece as it comes; nothing is held back.

use crate::call::Command;
use crate::engines::Lease;
use crate::news::{End, News, Passed, Post};
use crate::tap::Tap;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Sleep, sleep};

/// The last event of a stream that its engine broke off. No [DONE] follows, and the connection is closed.
const BROKEN_OFF: &[u8] =
    b"data: {\"error\":{\"message\":\"the engine broke off\",\"type\":\"server_error\",\"param\":null,\"code\":502}}\n\n";

/// The connection is closed without a word: its client must see that its answer is not whole.
#[derive(Debug)]
pub struct Cut;

impl fmt::Display for Cut {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("cut off")
    }
}

impl Error for Cut {}

#[derive(PartialEq)]
enum Stage {
    Passing,
    /// The last event was handed over; what is written goes out before the connection is cut.
    BrokenOff,
    Cut,
    Done,
}

/// The body of an answer that is passed on.
pub struct Passing {
    body: Incoming,
    lease: Option<Lease>,
    tap: Tap,
    stage: Stage,
    idle: Duration,
    /// Runs while the engine says nothing.
    alarm: Option<Pin<Box<Sleep>>>,
    commands: UnboundedReceiver<Command>,
    number: u64,
    post: Post,
    sent: Instant,
    told: bool,
}

impl Passing {
    pub(crate) fn new(
        (body, lease): (Incoming, Lease),
        events: bool,
        idle: Duration,
        commands: UnboundedReceiver<Command>,
        (number, post): (u64, Post),
        sent: Instant,
    ) -> Self {
        let tap = Tap::new(events);
        let mut passing = Self {
            body,
            lease: Some(lease),
            tap,
            stage: Stage::Passing,
            idle,
            alarm: None,
            commands,
            number,
            post,
            sent,
            told: false,
        };
        if passing.body.is_end_stream() {
            passing.whole();
        }
        passing
    }

    fn tell(&mut self, end: End) {
        if !self.told {
            self.told = true;
            let tail = self.tap.take();
            (self.post)(self.number, News::Passed(Passed { end, tail, took: self.sent.elapsed() }));
        }
    }

    fn whole(&mut self) {
        self.stage = Stage::Done;
        if let Some(lease) = self.lease.take() {
            lease.keep();
        }
        self.tell(End::Whole);
    }

    fn take(&mut self, piece: &[u8]) {
        self.alarm = None;
        if self.tap.feed(piece) {
            (self.post)(self.number, News::FirstToken(self.sent.elapsed()));
        }
        if self.body.is_end_stream() {
            self.whole();
        }
    }

    fn broken(&mut self) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        self.lease = None;
        let between = self.tap.is_between_events();
        self.tell(End::Broken);
        if !between {
            self.stage = Stage::Cut;
            return Poll::Ready(Some(Err(Cut)));
        }
        self.stage = Stage::BrokenOff;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(BROKEN_OFF)))))
    }

    /// Whether the engine has said nothing for too long.
    fn is_silent(&mut self, cx: &mut Context<'_>) -> bool {
        let idle = self.idle;
        self.alarm.get_or_insert_with(|| Box::pin(sleep(idle))).as_mut().poll(cx).is_ready()
    }
}

impl Body for Passing {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let this = &mut *self;
        match this.stage {
            Stage::Passing => (),
            Stage::Done => return Poll::Ready(None),
            Stage::Cut => return Poll::Ready(Some(Err(Cut))),
            Stage::BrokenOff => {
                this.stage = Stage::Cut;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        if this.commands.poll_recv(cx).is_ready() {
            this.stage = Stage::Cut;
            this.tell(End::ClientGone);
            return Poll::Ready(Some(Err(Cut)));
        }
        loop {
            return match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(piece) => {
                        this.take(&piece);
                        Poll::Ready(Some(Ok(Frame::data(piece))))
                    }
                    Err(_trailers) => continue,
                },
                Poll::Ready(Some(Err(_))) => this.broken(),
                Poll::Ready(None) => {
                    this.whole();
                    Poll::Ready(None)
                }
                Poll::Pending if this.is_silent(cx) => this.broken(),
                Poll::Pending => Poll::Pending,
            };
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stage == Stage::Done
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.lease = None; // the engine need not go on
        self.tell(End::ClientGone);
    }
}
