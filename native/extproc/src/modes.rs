//! How Envoy's filter sends bodies, and what that means for when a request can be decided.

use crate::proto::{BodySendMode, ProcessingRequest};

/// How a request's body comes, and how it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bodies {
    /// All is held until the body is complete; then headers and body are sent back.
    Duplex,
    /// The same, but each piece is answered by one message.
    Counted,
    /// Headers are let pass, the body comes in one piece, and the answer to it carries the decision.
    Buffered,
    /// Headers have to be answered before the body comes, or it never comes.
    Unseen,
}

/// How the body of the engine's answer comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// Each piece is sent back.
    Duplex,
    /// Each piece is let pass.
    Watched,
    /// Not at all.
    Unseen,
}

/// How bodies of requests come, by a stream's first message; what is wrong where they never come whole.
pub fn request_bodies(first: &ProcessingRequest) -> Result<Bodies, String> {
    let Some(config) = &first.protocol_config else { return Ok(Bodies::Duplex) };
    match config.request_body_mode() {
        mode @ (BodySendMode::BufferedPartial | BodySendMode::Grpc) => {
            let name = mode.as_str_name();
            Err(format!("request_body_mode {name} does not give whole bodies; configure FULL_DUPLEX_STREAMED"))
        }
        BodySendMode::FullDuplexStreamed => Ok(Bodies::Duplex),
        BodySendMode::Buffered => Ok(Bodies::Buffered),
        BodySendMode::Streamed if config.send_body_without_waiting_for_header_response => Ok(Bodies::Counted),
        BodySendMode::Streamed | BodySendMode::None => Ok(Bodies::Unseen),
    }
}

/// How bodies of answers come.
pub fn answer_bodies(first: &ProcessingRequest) -> Answers {
    let Some(config) = &first.protocol_config else { return Answers::Duplex };
    if config.response_body_mode == BodySendMode::None as i32 {
        Answers::Unseen
    } else if config.response_body_mode == BodySendMode::FullDuplexStreamed as i32 {
        Answers::Duplex
    } else {
        Answers::Watched
    }
}
