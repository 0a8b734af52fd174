//! Connections to engines: kept while they are good, bounded for each engine; failures by what they mean for a retry.

use crate::limits::{BUFFER_BYTES_MAX, Limits};
use crate::news::{Break, Fault};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::time::{interval, timeout};

type Sender = SendRequest<Full<Bytes>>;

#[derive(Default)]
struct Pool {
    in_use: usize,
    /// With the time since when nobody uses it; the last one is used first.
    idle: Vec<(Instant, Sender)>,
}

/// All connections to engines, by `host:port`.
pub struct Engines {
    limits: Limits,
    pools: Mutex<HashMap<Arc<str>, Pool>>,
}

/// A connection in use. Dropped before it is [`kept`](Lease::keep), it is closed, and its engine stops working for it.
pub struct Lease {
    engines: Arc<Engines>,
    authority: Arc<str>,
    sender: Option<Sender>,
}

impl Lease {
    /// Give the connection back: the answer was read to its end.
    pub fn keep(mut self) {
        let Some(sender) = self.sender.take().filter(|sender| !sender.is_closed()) else { return };
        if let Some(pool) = self.engines.pools.lock().get_mut(&self.authority) {
            pool.idle.push((Instant::now(), sender));
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut pools = self.engines.pools.lock();
        if let Some(pool) = pools.get_mut(&self.authority) {
            pool.in_use -= 1;
            if pool.in_use == 0 && pool.idle.is_empty() {
                pools.remove(&self.authority);
            }
        }
    }
}

impl Engines {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, pools: Mutex::default() })
    }

    /// Close connections that nobody has used for long, as long as the runtime lives.
    pub(crate) async fn sweep(self: Arc<Self>) {
        let mut ticks = interval((self.limits.engine_keep_alive / 2).max(Duration::from_millis(50)));
        loop {
            ticks.tick().await;
            self.pools.lock().retain(|_, pool| {
                pool.idle.retain(|(since, sender)| since.elapsed() < self.limits.engine_keep_alive && !sender.is_closed());
                pool.in_use > 0 || !pool.idle.is_empty()
            });
        }
    }

    /// Send a request; return its answer when that begins.
    ///
    /// A connection that was kept may have been closed by the engine just now: then another one is used.
    pub async fn send(
        self: &Arc<Self>,
        authority: &str,
        request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, Lease), Fault> {
        let mut lease = self.lease(authority)?;
        loop {
            let (mut sender, kept) = match self.idle(&lease.authority).await {
                Some(sender) => (sender, true),
                None => (self.connect(authority).await?, false),
            };
            let again = kept.then(|| request.clone());
            let sent = timeout(self.limits.first_byte, sender.send_request(again.unwrap_or_else(|| request.clone())));
            match sent.await {
                Ok(Ok(response)) => {
                    lease.sender = Some(sender);
                    return Ok((response, lease));
                }
                Ok(Err(error)) => match fault(&error) {
                    Fault { how: Break::Reset, .. } if kept => continue,
                    fault => return Err(fault),
                },
                Err(_) => {
                    let problem = format!("no answer began for {} s", self.limits.first_byte.as_secs_f64());
                    return Err(Fault::new(Break::Silent, problem));
                }
            }
        }
    }

    /// Send a request and read its whole answer, of so many bytes at most.
    pub async fn fetch(
        self: &Arc<Self>,
        authority: &str,
        request: Request<Full<Bytes>>,
        bytes_max: usize,
    ) -> Result<(http::StatusCode, Bytes), Fault> {
        let (response, lease) = self.send(authority, request).await?;
        let (head, body) = response.into_parts();
        match timeout(self.limits.idle, Limited::new(body, bytes_max).collect()).await {
            Ok(Ok(body)) => {
                lease.keep();
                Ok((head.status, body.to_bytes()))
            }
            Ok(Err(error)) => Err(Fault::new(Break::Reset, error.to_string())),
            Err(_) => Err(Fault::new(Break::Silent, "its answer stopped midway")),
        }
    }

    fn lease(self: &Arc<Self>, authority: &str) -> Result<Lease, Fault> {
        let mut pools = self.pools.lock();
        let authority: Arc<str> = match pools.get_key_value(authority) {
            Some((known, _)) => known.clone(),
            None => authority.into(),
        };
        let pool = pools.entry(authority.clone()).or_default();
        if pool.in_use >= self.limits.engine_connections_max {
            let problem = format!("all {} connections to it are in use", self.limits.engine_connections_max);
            return Err(Fault::new(Break::AllInUse, problem));
        }
        pool.in_use += 1;
        Ok(Lease { engines: self.clone(), authority, sender: None })
    }

    /// A kept connection that is good as far as can be known.
    async fn idle(&self, authority: &str) -> Option<Sender> {
        loop {
            let (since, mut sender) = self.pools.lock().get_mut(authority)?.idle.pop()?;
            let fresh = since.elapsed() < self.limits.engine_keep_alive;
            if fresh && timeout(self.limits.connect, sender.ready()).await.is_ok_and(|ready| ready.is_ok()) {
                return Some(sender);
            }
        }
    }

    async fn connect(&self, authority: &str) -> Result<Sender, Fault> {
        let stream = match timeout(self.limits.connect, TcpStream::connect(authority)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(Fault::new(Break::NoConnection, format!("no connection: {error}"))),
            Err(_) => return Err(Fault::new(Break::NoConnection, "no connection in time (proxy.connectTimeout)")),
        };
        let _ = stream.set_nodelay(true);
        let connection = http1::Builder::new().max_buf_size(BUFFER_BYTES_MAX).handshake(TokioIo::new(stream)).await;
        let (sender, connection) = connection.map_err(|error| fault(&error))?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

fn fault(error: &hyper::Error) -> Fault {
    if error.is_parse() {
        return Fault::new(Break::Garbage, format!("its answer is no HTTP: {error}"));
    }
    Fault::new(Break::Reset, "it closed the connection before its answer was whole")
}
