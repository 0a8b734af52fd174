//! Health checks, on the port that is checked. Source: grpc.health.v1.

use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_stream::wrappers::WatchStream;
use tonic::Status;

/// The service whose streams are answered here.
pub const SERVICE: &str = "envoy.service.ext_proc.v3.ExternalProcessor";

/// Whose health is asked for.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Asked {
    #[prost(string, tag = "1")]
    service: String,
}

/// What it is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Told {
    #[prost(enumeration = "Health", tag = "1")]
    status: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
enum Health {
    Unknown = 0,
    Serving = 1,
    NotServing = 2,
    ServiceUnknown = 3,
}

/// What is to be told now of a service; `ready`: whether requests should be sent here.
fn health(service: &str, ready: bool) -> Health {
    match service {
        "liveness" => Health::Serving,
        "" | "readiness" | SERVICE if ready => Health::Serving,
        "" | "readiness" | SERVICE => Health::NotServing,
        _ => Health::ServiceUnknown,
    }
}

/// Answer one check.
pub fn check(asked: &Asked, ready: bool) -> Result<Told, Status> {
    match health(&asked.service, ready) {
        Health::ServiceUnknown => Err(Status::not_found("no such service")),
        status => Ok(Told { status: status as i32 }),
    }
}

/// Tell whenever it changes.
pub fn told(asked: Asked, ready: watch::Receiver<bool>) -> impl Stream<Item = Result<Told, Status>> + Send {
    use tokio_stream::StreamExt as _;
    WatchStream::new(ready).map(move |ready| Ok(Told { status: health(&asked.service, ready) as i32 }))
}
