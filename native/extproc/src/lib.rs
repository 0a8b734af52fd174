//! The gRPC of Envoy's endpoint picker, without Python in it: streams of ext_proc messages, and health checks.
//!
//! It decides nothing. A request that is whole is told as [`news::Asked`]; whoever decides answers with one [`news::Command`], and
//! the rest of its stream is answered without asking again. `kvatlas.serve.extproc` has the same in Python: `stream.py` is
//! [`exchange`], `answer.py` is [`answer`], `messages.py` and `modes.py` are [`messages`] and [`modes`], `held.py` is [`held`].

pub mod answer;
mod codec;
pub mod door;
#[allow(missing_docs, dead_code, clippy::all)] // proto/generate.py writes it
mod envoy;
pub mod exchange;
mod health;
pub mod held;
pub mod messages;
pub mod modes;
pub mod news;
mod stream;

/// Envoy's messages, as far as they are used.
pub mod proto {
    pub use crate::envoy::envoy::config::core::v3::header_value_option::HeaderAppendAction;
    pub use crate::envoy::envoy::config::core::v3::{HeaderMap, HeaderValue, HeaderValueOption, Metadata};
    pub use crate::envoy::envoy::extensions::filters::http::ext_proc::v3::processing_mode::BodySendMode;
    pub use crate::envoy::envoy::service::ext_proc::v3::*;
    pub use crate::envoy::envoy::r#type::v3::HttpStatus;
}
