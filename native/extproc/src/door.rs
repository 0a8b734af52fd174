//! A listener with Envoy's connections, in threads of its own.

use crate::codec::Protobuf;
use crate::health::{self, Asked, Told};
use crate::held::Room;
use crate::news::{News, Post, Rules};
use crate::proto::{ProcessingRequest, ProcessingResponse};
use crate::stream::{Answering, Requests};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kvatlas_http::listen::{accept, listen};
use parking_lot::Mutex;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::body::Body;
use tonic::server::{Grpc, ServerStreamingService, StreamingService, UnaryService};
use tonic::{Request, Response, Status};

/// What a message may hold beside a whole body.
const MESSAGE_BYTES_SPARE: usize = 1 << 20;
/// Of metadata, as other gRPC servers have it.
const METADATA_BYTES_MAX: u32 = 16 << 10;
/// Sent ahead on one stream, and on one connection: a stream that waits must not hold up the others.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// Streams of one connection beyond `streams_max`, so that they can be told that there are too many.
const STREAMS_SPARE: u32 = 1024;
/// A connection whose other end does not answer for so long is dead.
const PING: Duration = Duration::from_secs(20);

/// What all connections share.
pub struct Shared {
    pub(crate) rules: Arc<Rules>,
    pub(crate) room: Arc<Room>,
    pub(crate) post: Post,
    pub(crate) streams: AtomicUsize,
    last_number: AtomicU64,
    ready: watch::Sender<bool>,
    /// True: no new streams are taken.
    stopping: watch::Sender<bool>,
}

impl Shared {
    /// A number for a stream that nobody else has.
    pub(crate) fn next_number(&self) -> u64 {
        self.last_number.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Has a port from [`open`](Door::open), serves from [`serve`](Door::serve) until it is closed or dropped.
pub struct Door {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    listener: Mutex<Option<TcpListener>>,
    runtime: Mutex<Option<Runtime>>,
}

impl Door {
    /// Take a port, for so many threads.
    pub fn open(address: SocketAddr, rules: Rules, threads: usize, post: Post) -> io::Result<Self> {
        let runtime =
            Builder::new_multi_thread().worker_threads(threads).thread_name("kvatlas-extproc").enable_all().build()?;
        let shared = Shared {
            room: Arc::new(Room::new(rules.held_bytes_max)),
            rules: Arc::new(rules),
            post,
            streams: AtomicUsize::new(0),
            last_number: AtomicU64::new(0),
            ready: watch::Sender::new(false),
            stopping: watch::Sender::new(false),
        };
        let entered = runtime.enter();
        let listener = listen(address, false)?;
        let address = listener.local_addr()?;
        drop(entered);
        Ok(Self { address, shared: Arc::new(shared), listener: Mutex::new(Some(listener)), runtime: Mutex::new(Some(runtime)) })
    }

    /// Take connections.
    pub fn serve(&self) {
        if let (Some(runtime), Some(listener)) = (&*self.runtime.lock(), self.listener.lock().take()) {
            let shared = self.shared.clone();
            runtime.spawn(accept(listener, self.shared.stopping.subscribe(), move |stream, _| {
                tokio::spawn(connection(shared.clone(), stream, shared.stopping.subscribe()));
            }));
        }
    }

    /// Let health checks say whether requests should be sent here.
    pub fn set_ready(&self, ready: bool) {
        self.shared.ready.send_replace(ready);
    }

    /// Take no new streams; [`News::Idle`] comes when those in progress, and their connections, have ended.
    pub fn stop_accepting(&self) {
        let shared = self.shared.clone();
        shared.stopping.send_replace(true);
        if let Some(runtime) = &*self.runtime.lock() {
            runtime.spawn(async move {
                shared.stopping.closed().await;
                (shared.post)(0, News::Idle);
            });
        }
    }

    /// Streams in progress.
    pub fn streams(&self) -> usize {
        self.shared.streams.load(Ordering::Relaxed)
    }

    /// Of bodies that are held.
    pub fn held_bytes(&self) -> u64 {
        self.shared.room.used_bytes()
    }

    /// Cut every connection, and end all threads. The ends of streams have been told then.
    pub fn close(&self) {
        self.listener.lock().take();
        if let Some(runtime) = self.runtime.lock().take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.lock().take() {
            runtime.shutdown_background();
        }
    }
}

async fn connection(shared: Arc<Shared>, stream: TcpStream, mut stopping: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    let streams_max = u32::try_from(shared.rules.streams_max).unwrap_or(u32::MAX);
    let calls = service_fn(|request| call(shared.clone(), request));
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .max_header_list_size(METADATA_BYTES_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(streams_max.saturating_add(STREAMS_SPARE))
        // Clients that leave at once, and streams that both ends close at once, are no attack of Envoy's.
        .max_pending_accept_reset_streams(shared.rules.streams_max.saturating_add(STREAMS_SPARE as usize))
        .max_local_error_reset_streams(None)
        .serve_connection(TokioIo::new(stream), calls);
    tokio::pin!(connection);
    // How a connection ended is its streams' news, not its own.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stopping.wait_for(|stops| *stops) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

async fn call(shared: Arc<Shared>, request: http::Request<Incoming>) -> Result<http::Response<Body>, Infallible> {
    Ok(match request.uri().path() {
        "/envoy.service.ext_proc.v3.ExternalProcessor/Process" => {
            let bytes_max = usize::try_from(shared.rules.body_bytes_max).unwrap_or(usize::MAX);
            let codec = Protobuf::<ProcessingRequest, ProcessingResponse>::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(bytes_max.saturating_add(MESSAGE_BYTES_SPARE));
            grpc.streaming(Process(shared), request).await
        }
        "/grpc.health.v1.Health/Check" => Grpc::new(Protobuf::<Asked, Told>::default()).unary(Check(shared), request).await,
        "/grpc.health.v1.Health/Watch" => {
            Grpc::new(Protobuf::<Asked, Told>::default()).server_streaming(Watch(shared), request).await
        }
        _ => Status::unimplemented("there is no such method here").into_http(),
    })
}

struct Process(Arc<Shared>);

impl StreamingService<Result<ProcessingRequest, prost::DecodeError>> for Process {
    type Response = ProcessingResponse;
    type ResponseStream = Answering;
    type Future = Ready<Result<Response<Answering>, Status>>;

    fn call(&mut self, request: Request<Requests>) -> Self::Future {
        ready(Ok(Response::new(Answering::new(self.0.clone(), request.into_inner()))))
    }
}

type Question = Request<Result<Asked, prost::DecodeError>>;

fn asked(request: Question) -> Result<Asked, Status> {
    request.into_inner().map_err(|_| Status::invalid_argument("this is no HealthCheckRequest"))
}

struct Check(Arc<Shared>);

impl UnaryService<Result<Asked, prost::DecodeError>> for Check {
    type Response = Told;
    type Future = Ready<Result<Response<Told>, Status>>;

    fn call(&mut self, request: Question) -> Self::Future {
        let ready_now = *self.0.ready.borrow();
        ready(asked(request).and_then(|asked| health::check(&asked, ready_now)).map(Response::new))
    }
}

struct Watch(Arc<Shared>);

impl ServerStreamingService<Result<Asked, prost::DecodeError>> for Watch {
    type Response = Told;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<Told, Status>> + Send>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Question) -> Self::Future {
        let told = asked(request).map(|asked| health::told(asked, self.0.ready.subscribe()));
        ready(told.map(|told| Response::new(Box::pin(told) as Self::ResponseStream)))
    }
}
