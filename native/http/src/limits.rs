//! What connections and requests may cost.

use std::time::Duration;

/// Bounds of a door. What they mean for users stands in `kvatlas.config.proxy`.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open connections of clients; further ones are closed.
    pub connections_max: usize,
    /// For a client to send a body, or to take a piece of its answer.
    pub client: Duration,
    /// How long a client's connection may idle, or take to send headers.
    pub keep_alive: Duration,
    /// Requests in progress at one engine.
    pub engine_connections_max: usize,
    /// To connect to an engine.
    pub connect: Duration,
    /// For an answer to begin.
    pub first_byte: Duration,
    /// Between two pieces of an answer.
    pub idle: Duration,
    /// How long an unused connection to an engine is kept.
    pub engine_keep_alive: Duration,
}

/// A body up to this length is read before anybody is asked.
pub const EAGER_BYTES_MAX: u64 = 64 << 10;
/// Of what is read ahead on a connection, and of a head.
pub const BUFFER_BYTES_MAX: usize = 64 << 10;
/// How long what is left of a refused body is read, so that its client reads the answer.
pub const LINGER: Duration = Duration::from_secs(2);
/// Of an answer's end that is kept, for its usage.
pub const TAIL_BYTES_MAX: usize = 16 << 10;
