//! A port, and who comes to it.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::time::sleep;

/// After an accept that failed: descriptors may be free again then.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const BACKLOG: u32 = 1024;

/// Take a port. `share`: other processes may listen there too (SO_REUSEPORT); without it a second one of our own would
/// take a part of the connections, unnoticed.
pub fn listen(address: SocketAddr, share: bool) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(share)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Hand on each connection until `stopping` is true.
pub async fn accept(listener: TcpListener, mut stopping: watch::Receiver<bool>, take: impl Fn(TcpStream, SocketAddr)) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|stops| *stops) => return,
        };
        match accepted {
            Ok((stream, peer)) => take(stream, peer),
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}
