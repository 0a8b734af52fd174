//! A listener with its clients' connections, in threads of its own.

use crate::call;
use crate::engines::Engines;
use crate::headers::{Dropped, Pairs, to_engine};
use crate::limits::{BUFFER_BYTES_MAX, Limits};
use crate::listen::{accept, listen};
use crate::news::{News, Post};
use crate::stall::Stall;
use bytes::Bytes;
use http::{HeaderValue, Request, Uri};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

/// What all connections share.
pub struct Shared {
    pub(crate) limits: Limits,
    pub(crate) dropped: Dropped,
    pub(crate) post: Post,
    pub(crate) engines: Arc<Engines>,
    last_number: AtomicU64,
    connections: AtomicUsize,
    /// True: connections are closed once they are idle.
    stopping: watch::Sender<bool>,
}

impl Shared {
    /// A number for a request that nobody else has.
    pub fn next_number(&self) -> u64 {
        self.last_number.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Serves from [`open`](Door::open) until it is closed or dropped.
pub struct Door {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Mutex<Option<Runtime>>,
}

impl Door {
    /// Listen, in so many threads. `share`: other processes may listen there too (SO_REUSEPORT).
    pub fn open(
        address: SocketAddr,
        share: bool,
        limits: Limits,
        dropped: Dropped,
        threads: usize,
        post: Post,
    ) -> io::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(threads).thread_name("kvatlas-http").enable_all().build()?;
        let engines = Engines::new(limits.clone());
        let (stopping, _) = watch::channel(false);
        let shared = Arc::new(Shared {
            limits,
            dropped,
            post,
            engines: engines.clone(),
            last_number: AtomicU64::new(0),
            connections: AtomicUsize::new(0),
            stopping,
        });
        let entered = runtime.enter();
        let listener = listen(address, share)?;
        let address = listener.local_addr()?;
        let taking = shared.clone();
        runtime.spawn(accept(listener, shared.stopping.subscribe(), move |stream, peer| take(&taking, stream, peer)));
        runtime.spawn(engines.sweep());
        drop(entered);
        Ok(Self { address, shared, runtime: Mutex::new(Some(runtime)) })
    }

    /// Take no new connections, and close those that carry no request; the others when theirs has ended.
    pub fn stop_accepting(&self) {
        self.shared.stopping.send_replace(true);
    }

    /// Cut every connection, and end all threads.
    pub fn close(&self) {
        if let Some(runtime) = self.runtime.lock().take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }

    /// Ask an engine something for ourselves; told as [`News::Fetched`] of the number that is returned.
    pub fn fetch(&self, authority: String, target: &str, headers: &Pairs, bytes_max: usize) -> Result<u64, String> {
        let number = self.shared.next_number();
        let host = HeaderValue::from_str(&authority).map_err(|error| error.to_string())?;
        let mut request = Request::new(Full::new(Bytes::new()));
        *request.uri_mut() = Uri::try_from(target).map_err(|error| error.to_string())?;
        *request.headers_mut() =
            to_engine(&http::HeaderMap::new(), &self.shared.dropped, host, std::net::Ipv4Addr::LOCALHOST.into(), headers);
        let shared = self.shared.clone();
        if let Some(runtime) = &*self.runtime.lock() {
            runtime.spawn(async move {
                let fetched = shared.engines.fetch(&authority, request, bytes_max).await;
                (shared.post)(number, News::Fetched(fetched));
            });
        }
        Ok(number)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.lock().take() {
            runtime.shutdown_background();
        }
    }
}

fn take(shared: &Arc<Shared>, stream: TcpStream, peer: SocketAddr) {
    if shared.connections.fetch_add(1, Ordering::Relaxed) >= shared.limits.connections_max {
        shared.connections.fetch_sub(1, Ordering::Relaxed);
    } else {
        tokio::spawn(serve(shared.clone(), stream, peer));
    }
}

/// Counts a connection until it ends, in whatever way.
struct Counted(Arc<Shared>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn serve(shared: Arc<Shared>, stream: TcpStream, peer: SocketAddr) {
    let _counted = Counted(shared.clone());
    let _ = stream.set_nodelay(true);
    let mut stopping = shared.stopping.subscribe();
    let io = TokioIo::new(Stall::new(stream, shared.limits.client));
    let answers = service_fn(|request| call::answer(shared.clone(), peer.ip().to_canonical(), request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(shared.limits.keep_alive)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(io, answers);
    tokio::pin!(connection);
    // How a connection ended is its requests' news, not its own.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stopping.wait_for(|stops| *stops) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}
