//! Which headers pass, in both directions. The names come from `kvatlas.serve.proxy.headers`, which is the specification.

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING};
use std::net::IpAddr;

/// Headers to set, in place of those of the same name.
pub type Pairs = Vec<(HeaderName, HeaderValue)>;

/// What is never passed on as it came.
#[derive(Clone, Debug, Default)]
pub struct Dropped {
    /// Of requests.
    pub requests: Vec<HeaderName>,
    /// Of answers.
    pub answers: Vec<HeaderName>,
}

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Whether a request's length could be read in two ways.
pub fn ambiguous(headers: &HeaderMap) -> bool {
    headers.contains_key(CONTENT_LENGTH) && headers.contains_key(TRANSFER_ENCODING)
}

/// A request's headers as an engine gets them.
pub fn to_engine(client: &HeaderMap, dropped: &Dropped, host: HeaderValue, peer: IpAddr, routing: &Pairs) -> HeaderMap {
    let mut headers = kept(client, &dropped.requests);
    let mut forwarded: Vec<u8> = Vec::new();
    for value in client.get_all(FORWARDED_FOR) {
        forwarded.extend_from_slice(value.as_bytes());
        forwarded.extend_from_slice(b", ");
    }
    forwarded.extend_from_slice(peer.to_string().as_bytes());
    headers.insert(HOST, host);
    if let Ok(value) = HeaderValue::from_bytes(&forwarded) {
        headers.insert(FORWARDED_FOR, value);
    }
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    set(&mut headers, routing);
    headers
}

/// An answer's headers as its client gets them. Content-Length stays: bodies are passed as they are.
pub fn to_client(engine: &HeaderMap, dropped: &Dropped, hidden: &[HeaderName], reply: &Pairs) -> HeaderMap {
    let mut headers = kept(engine, &dropped.answers);
    for name in hidden {
        headers.remove(name);
    }
    set(&mut headers, reply);
    headers
}

fn set(headers: &mut HeaderMap, pairs: &Pairs) {
    for (name, value) in pairs {
        headers.insert(name.clone(), value.clone());
    }
}

/// What is left without the names that are dropped and those that Connection names; what frames a body is not the sender's to hide.
fn kept(all: &HeaderMap, dropped: &[HeaderName]) -> HeaderMap {
    let mut headers = all.clone();
    for value in all.get_all(CONNECTION) {
        for name in value.as_bytes().split(|byte| *byte == b',') {
            match HeaderName::from_bytes(name.trim_ascii()) {
                Ok(name) if name != CONTENT_LENGTH && name != HOST => drop(headers.remove(name)),
                _ => (),
            }
        }
    }
    for name in dropped {
        headers.remove(name);
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    fn dropped() -> Dropped {
        let names = |names: &[&'static str]| names.iter().copied().map(HeaderName::from_static).collect();
        Dropped { requests: names(&["connection", "x-own", "x-forwarded-for"]), answers: names(&["connection", "x-own"]) }
    }

    #[test]
    fn what_connection_names_and_what_is_dropped_does_not_pass() {
        let client = map(&[("connection", "x-secret , Keep-Alive"), ("x-secret", "1"), ("x-own", "1"), ("x-kept", "1")]);
        let sent = to_engine(&client, &dropped(), HeaderValue::from_static("e:1"), [10, 0, 0, 5].into(), &Vec::new());
        let told = to_client(&client, &dropped(), &[HeaderName::from_static("x-kept")], &Vec::new());
        assert!(!sent.contains_key("x-secret") && !sent.contains_key("x-own") && !sent.contains_key("connection"));
        assert_eq!(
            (&sent["x-kept"], &sent["host"], &sent["x-forwarded-for"]),
            (&"1".parse().unwrap(), &"e:1".parse().unwrap(), &"10.0.0.5".parse().unwrap())
        );
        assert!(told.is_empty());
    }

    #[test]
    fn what_frames_a_body_is_not_the_senders_to_hide() {
        let engine = map(&[("connection", "content-length"), ("content-length", "5")]);
        assert_eq!(to_client(&engine, &dropped(), &[], &Vec::new())["content-length"], "5");
    }

    #[test]
    fn the_clients_address_is_added_to_those_before_and_ours_replace_the_clients() {
        let mut client = map(&[("x-forwarded-for", "1.1.1.1"), ("x-request-id", "theirs")]);
        client.append("x-forwarded-for", HeaderValue::from_static("2.2.2.2"));
        let routing = vec![(HeaderName::from_static("x-request-id"), HeaderValue::from_static("ours"))];
        let sent = to_engine(&client, &dropped(), HeaderValue::from_static("e:1"), [10, 0, 0, 5].into(), &routing);
        assert_eq!(sent["x-forwarded-for"], "1.1.1.1, 2.2.2.2, 10.0.0.5");
        assert_eq!(sent.get_all("x-request-id").iter().collect::<Vec<_>>(), ["ours"]);
    }
}
