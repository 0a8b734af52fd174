//! One client's request, from its head to where its answer begins to pass.

use crate::door::Shared;
use crate::headers::{self, Pairs};
use crate::limits::{EAGER_BYTES_MAX, LINGER};
use crate::news::{Arrival, BodyFault, Break, Fault, News};
use crate::passing::{Cut, Passing};
use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_TYPE, EXPECT, HeaderName, HeaderValue};
use http::request::Parts;
use http::{HeaderMap, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Incoming};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

/// What is to be done with a request.
pub enum Command {
    /// Read its body, of so many bytes at most.
    Read {
        /// Beyond it, the body is too large.
        bytes_max: u64,
    },
    /// Send it to an engine.
    Forward(Box<Forward>),
    /// Pass on the answer that is held.
    Pass,
    /// Answer it.
    Respond {
        /// Its code.
        status: StatusCode,
        /// Its headers.
        headers: Pairs,
        /// Its body.
        body: Bytes,
        /// Take nothing more from this connection.
        close: bool,
    },
    /// Close the connection without a word.
    Cut,
}

/// A request as an engine is to get it, and what is to be done with the answer.
pub struct Forward {
    /// `host:port`
    pub authority: String,
    /// Path and query.
    pub target: String,
    /// Headers to set, in place of the client's.
    pub routing: Pairs,
    /// In place of the body that came.
    pub body: Option<Bytes>,
    /// Headers to set on the answer.
    pub reply: Pairs,
    /// Headers of the answer that are not for the client.
    pub hidden: Vec<HeaderName>,
}

/// A body of an answer: our own, or an engine's.
pub type Reply = Either<Full<Bytes>, Passing>;

/// An answer that began.
struct Held {
    body: (Incoming, crate::engines::Lease),
    head: Response<()>,
    events: bool,
    sent: Instant,
}

/// Tells that the client went away, unless an answer began.
struct Watch {
    number: u64,
    shared: Arc<Shared>,
    over: bool,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.over {
            (self.shared.post)(self.number, News::Gone);
        }
    }
}

/// Answer a request as commands say.
pub async fn answer(shared: Arc<Shared>, peer: IpAddr, request: Request<Incoming>) -> Result<Response<Reply>, Cut> {
    let (head, body) = request.into_parts();
    let number = shared.next_number();
    let (sender, commands) = unbounded_channel();
    let mut call = Call {
        watch: Watch { number, shared: shared.clone(), over: false },
        shared,
        peer,
        body: Some(body),
        read: Bytes::new(),
        head,
    };
    let arrived = call.eager().await;
    call.tell(News::Arrived(Arrival {
        method: call.head.method.clone(),
        target: call.head.uri.path_and_query().map_or_else(|| "/".into(), ToString::to_string),
        headers: call.head.headers.clone(),
        body: arrived,
        ambiguous: headers::ambiguous(&call.head.headers),
        commands: sender,
    }));
    call.obey(commands).await
}

struct Call {
    watch: Watch,
    shared: Arc<Shared>,
    peer: IpAddr,
    head: Parts,
    /// Not read yet.
    body: Option<Incoming>,
    read: Bytes,
}

impl Call {
    fn tell(&self, news: News) {
        (self.shared.post)(self.watch.number, news);
    }

    /// Read a body that is short by its headers, unless the client asks first.
    async fn eager(&mut self) -> Option<Result<Bytes, BodyFault>> {
        let short = self.body.as_ref()?.size_hint().exact().is_some_and(|bytes| bytes <= EAGER_BYTES_MAX);
        if !short || self.head.headers.contains_key(EXPECT) {
            return None;
        }
        Some(self.read(EAGER_BYTES_MAX).await)
    }

    async fn read(&mut self, bytes_max: u64) -> Result<Bytes, BodyFault> {
        let Some(body) = &mut self.body else { return Ok(self.read.clone()) };
        let all = timeout(self.shared.limits.client, collect(body, bytes_max));
        self.read = all.await.unwrap_or(Err(BodyFault::TooSlow))?;
        self.body = None;
        Ok(self.read.clone())
    }

    async fn obey(mut self, mut commands: UnboundedReceiver<Command>) -> Result<Response<Reply>, Cut> {
        let mut held = None;
        while let Some(command) = commands.recv().await {
            match command {
                Command::Read { bytes_max } => {
                    let read = self.read(bytes_max).await;
                    self.tell(News::Body(read));
                }
                Command::Forward(forward) => {
                    held = None; // its connection is closed, or kept where nothing is left to read
                    match self.forward(*forward).await {
                        Ok((answer, true)) => return Ok(self.pass(answer, commands)),
                        Ok((answer, false)) => held = Some(answer),
                        Err(fault) => self.tell(News::Failed(fault)),
                    }
                }
                Command::Pass => match held.take() {
                    Some(answer) => return Ok(self.pass(answer, commands)),
                    None => break,
                },
                Command::Respond { status, headers, body, close } => return Ok(self.respond(status, headers, body, close)),
                Command::Cut => break,
            }
        }
        self.watch.over = true;
        Err(Cut)
    }

    /// Send the request; return the answer when it begins, and whether it is to be passed on at once. An engine that says
    /// that it is too busy (503) is held: somebody else may take the request.
    async fn forward(&self, forward: Forward) -> Result<(Held, bool), Fault> {
        let sent = Instant::now();
        let request = self.to_engine(&forward)?;
        let (response, lease) = self.shared.engines.send(&forward.authority, request).await?;
        let (engine, body) = response.into_parts();
        let passing = engine.status != StatusCode::SERVICE_UNAVAILABLE;
        let mut head = Response::new(());
        *head.status_mut() = engine.status;
        *head.headers_mut() = headers::to_client(&engine.headers, &self.shared.dropped, &forward.hidden, &forward.reply);
        let events = is_events(&engine.headers);
        self.tell(News::Answered { status: engine.status, headers: engine.headers, passing });
        Ok((Held { body: (body, lease), head, events, sent }, passing))
    }

    fn to_engine(&self, forward: &Forward) -> Result<Request<Full<Bytes>>, Fault> {
        let wrong = |what: &str| Fault::new(Break::NoConnection, format!("{what} cannot be sent"));
        let host = HeaderValue::from_str(&forward.authority).map_err(|_| wrong("its address"))?;
        let mut request = Request::new(Full::new(forward.body.clone().unwrap_or_else(|| self.read.clone())));
        *request.method_mut() = self.head.method.clone();
        *request.uri_mut() = Uri::try_from(forward.target.as_str()).map_err(|_| wrong("the path"))?;
        *request.headers_mut() =
            headers::to_engine(&self.head.headers, &self.shared.dropped, host, self.peer, &forward.routing);
        Ok(request)
    }

    fn pass(mut self, held: Held, commands: UnboundedReceiver<Command>) -> Response<Reply> {
        self.watch.over = true;
        let told = (self.watch.number, self.shared.post.clone());
        let passing = Passing::new(held.body, held.events, self.shared.limits.idle, commands, told, held.sent);
        held.head.map(|()| Either::Right(passing))
    }

    fn respond(mut self, status: StatusCode, headers: Pairs, body: Bytes, close: bool) -> Response<Reply> {
        self.watch.over = true;
        if let Some(rest) = self.body.take() {
            tokio::spawn(linger(rest));
        }
        let mut response = Response::new(Either::Left(Full::new(body)));
        *response.status_mut() = status;
        response.headers_mut().extend(headers);
        if close {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

fn is_events(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"))
}

async fn collect(body: &mut Incoming, bytes_max: u64) -> Result<Bytes, BodyFault> {
    if body.size_hint().lower() > bytes_max {
        return Err(BodyFault::TooLarge);
    }
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame.map_err(|_| BodyFault::Framing)?.into_data() else { continue };
        if (first.len() + all.len() + piece.len()) as u64 > bytes_max {
            return Err(BodyFault::TooLarge);
        }
        if first.is_empty() {
            first = piece; // mostly the only one
        } else {
            all.extend_from_slice(&piece);
        }
    }
    if all.is_empty() {
        return Ok(first);
    }
    let mut whole = BytesMut::from(first);
    whole.unsplit(all);
    Ok(whole.freeze())
}

/// Read on for a while, so that a client that still sends reads its answer.
async fn linger(mut body: Incoming) {
    let rest = async { while let Some(Ok(_)) = body.frame().await {} };
    let _ = timeout(LINGER, rest).await;
}
