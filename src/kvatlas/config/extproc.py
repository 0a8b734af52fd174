"""Settings of the Envoy ext-proc endpoint picker."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvatlas.config.kinds import Capacity, Limit, Wait
from kvatlas.config.quantities import Bytes, Seconds

_PORT = Meta(ge=0, le=65535)


class ExtProcSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """The endpoint picker that Envoy asks where requests go (ext_proc)."""

    host: Annotated[str, Meta(description="Address on which it and its health checks listen.", min_length=1)] = "127.0.0.1"
    port: Annotated[int, _PORT, Meta(description="Port for Envoy; 0 takes a free one.")] = 9002
    health_port: Annotated[int, _PORT, Meta(description="Port for gRPC health checks; 0 takes a free one.")] = 9003
    stack: Annotated[
        Literal["auto", "native", "python"],
        Meta(
            description="What carries gRPC on its port: native (Rust, no TLS) or python (grpc.aio). "
            "auto: native, unless it is not installed or TLS is asked for."
        ),
    ] = "auto"
    threads: Annotated[Limit, Meta(description="Threads of the native stack: one carries some thousand requests a second.")] = 1
    tls_cert_file: Annotated[str | None, Meta(description="PEM certificate chain for Envoy's port; needs tlsKeyFile.")] = None
    tls_key_file: Annotated[str | None, Meta(description="PEM private key; needs tlsCertFile.")] = None
    streams_max: Annotated[Limit, Meta(description="HTTP requests in progress; beyond it the answer is 429.")] = 4096
    body_bytes_max: Annotated[Capacity, Meta(description="A request with a longer body is answered with 413.")] = Bytes(
        16 << 20
    )
    held_bytes_max: Annotated[
        Capacity, Meta(description="Bodies held at the same time, of all requests; beyond it the answer is 429.")
    ] = Bytes(1 << 30)
    headers_bytes_max: Annotated[Capacity, Meta(description="A request with more headers is answered with 431.")] = Bytes(
        64 << 10
    )
    drain_delay: Annotated[
        Annotated[Seconds, Meta(ge=0)],
        Meta(
            description=(
                "How long requests are still taken when the service stops and health checks say no already, for Envoy to "
                "notice: two of its health checks."
            )
        ),
    ] = Seconds(3)
    shutdown_grace: Annotated[
        Wait, Meta(description="How long requests in progress may take to finish when the service stops.")
    ] = Seconds(10)
