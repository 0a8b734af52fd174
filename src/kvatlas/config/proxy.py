"""Settings of the proxy: where it listens, what a request may cost, how engines are called."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvatlas.config.kinds import Capacity, Limit, Share, Wait
from kvatlas.config.layers import Secret
from kvatlas.config.quantities import Bytes, Seconds


class ProxySettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """The OpenAI-compatible reverse proxy (`kvatlas route`)."""

    host: Annotated[str, Meta(description="Address on which it listens.", min_length=1)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Its port; 0 takes a free one.")] = 8000
    reuse_port: Annotated[bool, Meta(description="Share the port with other processes (SO_REUSEPORT).")] = False
    stack: Annotated[
        Literal["auto", "native", "python"],
        Meta(
            description="What carries HTTP: native (Rust, no TLS) or python (aiohttp). "
            "auto: native, unless it is not installed or TLS is asked for."
        ),
    ] = "auto"
    threads: Annotated[Limit, Meta(description="Threads of the native stack: one carries some thousand requests a second.")] = 1
    token: Annotated[Secret | None, Meta(description="Bearer token that clients need, except for health checks.")] = None
    token_file: Annotated[str | None, Meta(description="File that holds the token.")] = None
    tls_cert_file: Annotated[str | None, Meta(description="PEM certificate chain; needs tlsKeyFile.")] = None
    tls_key_file: Annotated[str | None, Meta(description="PEM private key; needs tlsCertFile.")] = None
    engine_token: Annotated[
        Secret | None,
        Meta(description="Bearer token for engines. Without it they get the client's own, unless that is for the proxy."),
    ] = None
    engine_ca_file: Annotated[
        str | None, Meta(description="PEM certificates to check engines by; by default those of the system.")
    ] = None
    body_bytes_max: Annotated[Capacity, Meta(description="A larger request body is refused (413).")] = Bytes(32 << 20)
    concurrency_max: Annotated[
        Limit, Meta(description="Requests in progress; beyond it the answer is 503 with Retry-After.")
    ] = 4096
    connections_max: Annotated[Limit, Meta(description="Open connections of clients; further ones are closed.")] = 8192
    engine_connections_max: Annotated[
        Limit, Meta(description="Connections to one engine; where all are in use, another engine is taken.")
    ] = 2048
    connect_timeout: Annotated[Wait, Meta(description="Longest time to connect to an engine.")] = Seconds(2)
    first_byte_timeout: Annotated[
        Wait,
        Meta(description="Longest wait for an answer to begin (504). Without streaming it begins when all is computed."),
    ] = Seconds(600)
    idle_timeout: Annotated[Wait, Meta(description="Longest pause within an answer; then it is broken off.")] = Seconds(120)
    request_timeout: Annotated[Wait, Meta(description="Longest time of a request altogether.")] = Seconds(3600)
    client_timeout: Annotated[
        Wait,
        Meta(description="Longest time for a request's body to arrive (408), or for a client to take a piece of its answer."),
    ] = Seconds(60)
    keep_alive: Annotated[Wait, Meta(description="How long a client's connection may idle, or take to send headers.")] = (
        Seconds(75)
    )
    engine_keep_alive: Annotated[
        Wait, Meta(description="How long an unused connection to an engine is kept; vLLM closes them after 5 s.")
    ] = Seconds(4)
    retries_max: Annotated[int, Meta(ge=0, description="Other engines tried where one fails before it answers. 0: none.")] = 2
    retry_share: Annotated[Share, Meta(description="Retries per request, over many requests; beyond it failures are told.")] = (
        0.2
    )
    models_ttl: Annotated[Wait, Meta(description="How long the list of models is taken from memory.")] = Seconds(5)
    shutdown_grace: Annotated[
        Wait, Meta(description="How long requests in progress may take to finish when the proxy stops.")
    ] = Seconds(30)
