//! The proxy's data plane, without Python in it: connections of clients and engines, and the bytes between them.
//!
//! It decides nothing. A request that arrived is told as [`news::News`]; whoever decides answers with a [`call::Command`], and
//! from then on bytes pass from engine to client without asking again. HTTP itself is hyper's.

pub mod call;
pub mod door;
pub mod engines;
pub mod headers;
pub mod limits;
pub mod listen;
pub mod news;
pub mod passing;
mod stall;
pub mod tap;
