"""The gRPC server: services, health, reflection, token, TLS and limits put together."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvatlas.config import ApiSettings
from kvatlas.errors import ConfigError
from kvatlas.netloc import netloc
from kvatlas.observe.metrics import Metrics
from kvatlas.proto.indexer.v1 import indexer_pb2_grpc
from kvatlas.proto.kvatlas.v1 import kvatlas_pb2_grpc
from kvatlas.serve import tokenization
from kvatlas.serve.gate import Gate
from kvatlas.serve.grpc_calls import Calls
from kvatlas.serve.grpc_services import KvAtlas, LlmdIndexer
from kvatlas.serve.listening import FREE_PORT
from kvatlas.serve.prompts import Prompts
from kvatlas.serve.queries import ServedIndex
from kvatlas.serve.token import TokenCheck
from kvatlas.tokens.tokenization import Tokenization

SERVICES = ("indexer.v1.IndexerService", "kvatlas.v1.KvAtlas", tokenization.SERVICE)
_HEALTH = "grpc.health.v1.Health"
_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
_READINESS = ("", "readiness", *SERVICES)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class GrpcServer:
    """All services on one port. Must be made in the event loop that it runs in."""

    def __init__(self, indexer: ServedIndex, tokens: Tokenization, gate: Gate | None = None) -> None:
        self._api = indexer.config.api
        prompts = Prompts(indexer.config, tokens, indexer.metrics)
        calls = Calls(self._api, indexer.metrics, gate or Gate(self._api.concurrency_max))
        self._server = make_server(self._api, indexer.metrics)
        self._atlas = KvAtlas(indexer, prompts, calls)
        indexer_pb2_grpc.add_IndexerServiceServicer_to_server(LlmdIndexer(indexer, prompts, calls), self._server)
        kvatlas_pb2_grpc.add_KvAtlasServicer_to_server(self._atlas, self._server)
        load = tokens.local.tokenizers.get if tokens.local else None
        tokenization.add_tokenization(self._server, tokens, load, calls, indexer.config.tokens.timeout)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, _HEALTH, _REFLECTION), self._server)
        self._ready: bool | None = None

    def bind(self) -> int:
        """Take the configured port and return it. Raises ConfigError where it cannot be had."""
        api = self._api
        credentials = server_credentials("api", api.tls_cert_file, api.tls_key_file)
        return take_port(self._server, "api.grpcPort", netloc(api.grpc_host, api.grpc_port), credentials)

    async def start(self) -> None:
        """Begin to serve. Not ready until :meth:`set_ready`."""
        await self._health.set("liveness", _SERVING)
        await self.set_ready(False)
        await self._server.start()

    async def set_ready(self, ready: bool) -> None:
        """Let health checks say whether answers can be relied on."""
        if ready != self._ready:
            self._ready = ready
            for name in _READINESS:
                await self._health.set(name, _SERVING if ready else _NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, wait for those in progress at most ``grace_s``, then cancel them."""
        await self.set_ready(False)
        await self._server.stop(grace_s)
        self._atlas.close()


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without the token, except health checks, before their message is read."""

    def __init__(self, check: TokenCheck, metrics: Metrics) -> None:
        self._check = check
        self._metrics = metrics

        async def refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._metrics.grpc("unauthenticated", grpc.StatusCode.UNAUTHENTICATED.name, 0.0)
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "authorization: the bearer token is missing or wrong; send the metadata authorization: Bearer TOKEN",
            )

        # As a streaming handler it does not read messages; on the wire all kinds of call begin alike.
        self._refusal: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if handler_call_details.method.startswith(f"/{_HEALTH}/"):
            return await continuation(handler_call_details)
        given = [value for key, value in handler_call_details.invocation_metadata or () if key == "authorization"]
        if self._check.allows(given[0] if len(given) == 1 else None):
            return await continuation(handler_call_details)
        return self._refusal


def make_server(api: ApiSettings, metrics: Metrics) -> grpc.aio.Server:
    """Return a server with the token check and limits of ``api``."""
    return grpc.aio.server(
        interceptors=[TokenInterceptor(TokenCheck(api.token), metrics)],
        options=[
            ("grpc.max_receive_message_length", api.body_bytes_max),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", 16 << 10),
            ("grpc.so_reuseport", 0),  # else a second service on the port would take half of its calls, unnoticed
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # llm-d's clients ping idle connections
        ],
        maximum_concurrent_rpcs=api.connections_max,
    )


def take_port(
    server: grpc.aio.Server, setting: str, address: str, credentials: grpc.ServerCredentials | None, remedy: str = FREE_PORT
) -> int:
    """Listen on an address and return its port. In clear without credentials. ConfigError where it cannot be had."""
    try:
        port = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if not port:
        raise ConfigError(setting, f"cannot listen on {address}", remedy)
    return port


def server_credentials(section: str, cert_file: str | None, key_file: str | None) -> grpc.ServerCredentials | None:
    """Return what TLS needs; None: in clear. ConfigError where a section's files are none that TLS can use."""
    if cert_file is None or key_file is None:
        return None
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert_file, key_file)  # gRPC would not say why
        return grpc.ssl_server_credentials([(Path(key_file).read_bytes(), Path(cert_file).read_bytes())])
    except (ssl.SSLError, OSError) as error:
        problem = f"no use with {section}.tlsKeyFile: {error}"
        raise ConfigError(f"{section}.tlsCertFile", problem, "a PEM chain and its key") from None
