//! Envoy's messages: what is read of them, and how answers are put together. Values in, values out.

use crate::news::{Headers, Pairs, Refusal};
use crate::proto::body_mutation::Mutation;
use crate::proto::processing_response::Response;
use crate::proto::{
    BodyMutation, BodyResponse, CommonResponse, HeaderAppendAction, HeaderMap, HeaderMutation, HeaderValue, HeaderValueOption,
    HeadersResponse, HttpStatus, ImmediateResponse, Metadata, ProcessingResponse, StreamedBodyResponse, TrailersResponse,
};
use bytes::Bytes;
use prost_types::value::Kind;
use prost_types::{Struct, Value};

/// Of a body sent back to Envoy: its limit for a message is 64 KiB.
pub const CHUNK_BYTES_MAX: usize = 62_000;
/// Where a request goes: a header, and a field of metadata.
pub const DESTINATION: &str = "x-gateway-destination-endpoint";
const SERVED: &str = "x-gateway-destination-endpoint-served";
const LB_NAMESPACE: &str = "envoy.lb";
const SUBSET_NAMESPACE: &str = "envoy.lb.subset_hint";
const SUBSET: &str = "x-gateway-destination-endpoint-subset";
const WENT_INTO_RESPONSE: &str = "x-went-into-resp-headers";

/// How long all names and values are together, in characters.
pub fn header_chars(headers: &HeaderMap) -> usize {
    let value = |header: &HeaderValue| match header.raw_value.len() {
        0 => header.value.chars().count(),
        length => length,
    };
    headers.headers.iter().map(|header| header.key.chars().count() + value(header)).sum()
}

/// Headers by lower-case name. Raw values are latin-1.
pub fn read_headers(headers: Option<HeaderMap>) -> Headers {
    let mut found = Headers::new();
    for header in headers.into_iter().flat_map(|map| map.headers) {
        let value = if header.raw_value.is_empty() { header.value } else { latin1(&header.raw_value) };
        let lower = !header.key.is_ascii() || header.key.bytes().any(|byte| byte.is_ascii_uppercase());
        let name = if lower { header.key.to_lowercase() } else { header.key };
        match found.get_mut(&name) {
            Some(joined) => {
                joined.push(',');
                joined.push_str(&value);
            }
            None => drop(found.insert(name, value)),
        }
    }
    found
}

fn latin1(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.is_ascii() => text.to_owned(),
        _ => bytes.iter().map(|byte| char::from(*byte)).collect(),
    }
}

/// A hint that names no addresses.
#[derive(Debug)]
pub struct NoHint;

/// The addresses that the gateway allows; None where it does not say.
pub fn subset_hint(metadata: Option<&Metadata>) -> Result<Option<Vec<String>>, NoHint> {
    let Some(hint) = field(metadata, SUBSET_NAMESPACE, SUBSET) else { return Ok(None) };
    let given: Vec<&str> = match &hint.kind {
        Some(Kind::StringValue(text)) => text.split(',').collect(),
        Some(Kind::ListValue(list)) => list.values.iter().map(text).collect::<Option<_>>().ok_or(NoHint)?,
        _ => return Err(NoHint),
    };
    Ok(Some(given.into_iter().map(str::trim).filter(|address| !address.is_empty()).map(str::to_owned).collect()))
}

/// The address that the gateway says it sent the request to, where it says so.
pub fn served_by(headers: &Headers, metadata: Option<&Metadata>) -> Option<String> {
    let told = field(metadata, LB_NAMESPACE, SERVED).and_then(text).filter(|address| !address.is_empty());
    told.or_else(|| headers.get(SERVED).map(String::as_str)).map(str::to_owned)
}

fn field<'a>(metadata: Option<&'a Metadata>, namespace: &str, name: &str) -> Option<&'a Value> {
    metadata?.filter_metadata.get(namespace)?.fields.get(name)
}

fn text(value: &Value) -> Option<&str> {
    match &value.kind {
        Some(Kind::StringValue(text)) => Some(text),
        _ => None,
    }
}

fn setting(name: String, value: Bytes) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue { key: name, raw_value: value, ..HeaderValue::default() }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd as i32,
    }
}

fn settings(pairs: Pairs) -> Vec<HeaderValueOption> {
    pairs.into_iter().map(|(name, value)| setting(name, value)).collect()
}

fn answer(response: Response) -> ProcessingResponse {
    ProcessingResponse { response: Some(response), dynamic_metadata: None }
}

fn replaced(mutation: Mutation) -> Option<CommonResponse> {
    let body_mutation = Some(BodyMutation { mutation: Some(mutation) });
    Some(CommonResponse { body_mutation, ..CommonResponse::default() })
}

fn streamed(body: Bytes, end_of_stream: bool) -> Option<CommonResponse> {
    replaced(Mutation::StreamedResponse(StreamedBodyResponse { body, end_of_stream }))
}

/// A decision: headers to set, those of the client's to remove, and the load balancer's metadata.
///
/// `consumed`: names that the client sent and that are not for the engine; `length`: of a body whose length Envoy does not know.
pub fn send_to(ours: Pairs, consumed: &[String], length: Option<usize>) -> (CommonResponse, Struct) {
    let destination = ours.iter().find(|(name, _)| name == DESTINATION).map_or(String::new(), |(_, value)| latin1(value));
    let removed = consumed.iter().filter(|name| !ours.iter().any(|(set, _)| set == *name)).cloned().collect();
    let mut set = settings(ours);
    set.extend(length.map(|length| setting("content-length".into(), length.to_string().into())));
    let mutation = HeaderMutation { set_headers: set, remove_headers: removed };
    let common = CommonResponse { header_mutation: Some(mutation), clear_route_cache: true, ..CommonResponse::default() };
    (common, nested(LB_NAMESPACE, Kind::StructValue(nested(DESTINATION, Kind::StringValue(destination)))))
}

fn nested(name: &str, kind: Kind) -> Struct {
    Struct { fields: [(name.to_owned(), Value { kind: Some(kind) })].into() }
}

/// The answer to a request's headers.
pub fn request_headers(common: CommonResponse, metadata: Struct) -> ProcessingResponse {
    let response = Some(Response::RequestHeaders(HeadersResponse { response: Some(common) }));
    ProcessingResponse { response, dynamic_metadata: Some(metadata) }
}

/// The answer to a body that came as a whole. `body`: in its place.
pub fn request_body(mut common: CommonResponse, metadata: Struct, body: Option<Bytes>) -> ProcessingResponse {
    common.body_mutation = body.map(|body| BodyMutation { mutation: Some(Mutation::Body(body)) });
    let response = Some(Response::RequestBody(BodyResponse { response: Some(common) }));
    ProcessingResponse { response, dynamic_metadata: Some(metadata) }
}

/// A request's body in messages that Envoy takes. `ends`: nothing follows, not even trailers.
pub fn body_chunks(mut body: Bytes, ends: bool) -> Vec<ProcessingResponse> {
    let mut chunks = Vec::with_capacity(body.len() / CHUNK_BYTES_MAX + 1);
    while !body.is_empty() || (ends && chunks.is_empty()) {
        let chunk = body.split_to(body.len().min(CHUNK_BYTES_MAX));
        let response = streamed(chunk, ends && body.is_empty());
        chunks.push(answer(Response::RequestBody(BodyResponse { response })));
    }
    chunks
}

/// One answer for each piece of a body; a changed body goes in place of the first.
pub fn counted(messages: usize, changed: Option<Bytes>) -> Vec<ProcessingResponse> {
    let reply = |number| {
        let mutation = match &changed {
            None => return unchanged(Kinds::RequestBody),
            Some(body) if number == 0 => Mutation::Body(body.clone()),
            Some(_) => Mutation::ClearBody(true),
        };
        answer(Response::RequestBody(BodyResponse { response: replaced(mutation) }))
    };
    (0..messages).map(reply).collect()
}

/// The answer to an answer's headers. `removed`: names that the client is not to see.
pub fn response_headers(mut set: Pairs, removed: Vec<String>) -> ProcessingResponse {
    set.push((WENT_INTO_RESPONSE.into(), Bytes::from_static(b"true")));
    let header_mutation = Some(HeaderMutation { set_headers: settings(set), remove_headers: removed });
    let response = Some(CommonResponse { header_mutation, ..CommonResponse::default() });
    answer(Response::ResponseHeaders(HeadersResponse { response }))
}

/// A piece of the engine's answer as it came.
pub fn answer_chunk(body: Bytes, ends: bool) -> ProcessingResponse {
    answer(Response::ResponseBody(BodyResponse { response: streamed(body, ends) }))
}

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Envoy's names
pub enum Kinds {
    RequestHeaders,
    RequestBody,
    RequestTrailers,
    ResponseHeaders,
    ResponseBody,
    ResponseTrailers,
}

/// The answer to a message of which nothing is to be changed.
pub fn unchanged(kind: Kinds) -> ProcessingResponse {
    let response = Some(CommonResponse::default());
    answer(match kind {
        Kinds::RequestHeaders => Response::RequestHeaders(HeadersResponse { response }),
        Kinds::RequestBody => Response::RequestBody(BodyResponse { response }),
        Kinds::RequestTrailers => Response::RequestTrailers(TrailersResponse::default()),
        Kinds::ResponseHeaders => Response::ResponseHeaders(HeadersResponse { response }),
        Kinds::ResponseBody => Response::ResponseBody(BodyResponse { response }),
        Kinds::ResponseTrailers => Response::ResponseTrailers(TrailersResponse::default()),
    })
}

/// The answer that ends a request here.
pub fn immediate(told: Refusal) -> ProcessingResponse {
    answer(Response::ImmediateResponse(ImmediateResponse {
        status: Some(HttpStatus { code: told.status }),
        headers: Some(HeaderMutation { set_headers: settings(told.headers), remove_headers: Vec::new() }),
        body: told.body,
        details: "kvatlas_refused".into(),
    }))
}
