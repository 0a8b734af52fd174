"""``kvatlas tokenizer``: tokenization.TokenizationService alone, on a Unix socket or on TCP, from start to graceful stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvatlas.config import ApiSettings, Config
from kvatlas.errors import ConfigError
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.serve.gate import Gate
from kvatlas.serve.grpc import make_server, server_credentials, take_port
from kvatlas.serve.grpc_calls import Calls
from kvatlas.serve.tokenization import SERVICE, AskedTokenization, LoadTokenizer, add_tokenization
from kvatlas.serve.unix_socket import clear_stale, identity, only_for, remove, socket_path
from kvatlas.tokens.tokenization import Tokenization

_log = get_logger(__name__)

_HEALTH = "grpc.health.v1.Health"
_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
_NAMES = ("", "liveness", "readiness", SERVICE)

FREE_ADDRESS = "a free address of this machine"


class TokenizationServer:
    """The service with health, reflection, token, TLS and limits of ``api``. To be made in the event loop that it runs in."""

    def __init__(
        self, api: ApiSettings, tokens: AskedTokenization, load: LoadTokenizer | None, timeout_s: float, metrics: Metrics
    ) -> None:
        self._api = api
        self._gate = Gate(api.concurrency_max)
        self._server = make_server(api, metrics)
        add_tokenization(self._server, tokens, load, Calls(api, metrics, self._gate), timeout_s)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, _HEALTH, _REFLECTION), self._server)
        self._sockets: list[tuple[Path, tuple[int, int]]] = []

    def listen(self, address: str, mode: int = 0o600) -> str:
        """Take an address and return it, with its port where 0 was asked for. Raises ConfigError where it cannot be had.

        ``unix:///path`` or ``host:port``. ``mode``: who may connect to a Unix socket, which is never encrypted.
        """
        path = socket_path(address)
        if path is None:
            return self._listen_tcp(address)
        clear_stale(path)
        with only_for(mode):
            take_port(self._server, "--listen", f"unix:{path}", None, FREE_ADDRESS)
        path.chmod(mode)
        self._sockets.append((path, identity(path)))
        return f"unix://{path}" if path.is_absolute() else f"unix:{path}"

    async def start(self) -> None:
        """Begin to serve."""
        await self._server.start()
        for name in _NAMES:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, wait for those in progress at most ``grace_s``, then cancel them; remove the sockets."""
        for name in _NAMES:
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        self._gate.drain()
        await self._server.stop(grace_s)
        self._gate.close()
        for path, made in self._sockets:
            remove(path, made)
        self._sockets.clear()

    def _listen_tcp(self, address: str) -> str:
        host, separator, port = address.rpartition(":")
        if not separator or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ConfigError("--listen", f"{address!r} is no address", "unix:///PATH or HOST:PORT, such as 127.0.0.1:50052")
        credentials = server_credentials("api", self._api.tls_cert_file, self._api.tls_key_file)
        return f"{host}:{take_port(self._server, '--listen', address, credentials, FREE_ADDRESS)}"


async def serve_tokenization(
    config: Config,
    addresses: Sequence[str],
    stop: asyncio.Event,
    *,
    socket_mode: int = 0o600,
    started: Callable[[list[str]], None] | None = None,
) -> None:
    """Serve until ``stop`` is set. ``started`` is called with the addresses once everything listens. Raises ConfigError."""
    from kvatlas.tokens.setup import make_tokenization

    api = config.api
    metrics = Metrics()
    async with AsyncExitStack() as cleanup:
        tokenization = make_tokenization(config.tokens, metrics)
        cleanup.callback(tokenization.close)
        if not tokenization.configured:
            raise ConfigError("--tokenizers", "there is nothing to tokenize with", "a directory of tokenizers, or a renderer")
        load = None if tokenization.local is None else tokenization.local.tokenizers.get
        server = TokenizationServer(api, tokenization, load, config.tokens.timeout, metrics)
        cleanup.push_async_callback(server.stop, 0)
        listening = [server.listen(address, socket_mode) for address in addresses]
        tokenization.warm()
        await server.start()
        found = await asyncio.to_thread(_found, tokenization)
        _log.info("serving tokenizers", listen=listening, tokenizers=found, authenticated=api.token is not None)
        for model in sorted(set(config.tokens.models).difference(found)):
            remedy = "correct tokens.models: a directory, or a name in one of tokens.directories"
            _log.warning("no tokenizer is there", model=model, place=config.tokens.models[model], remedy=remedy)
        if started is not None:
            started(listening)
        await stop.wait()
        _log.info("stopping", grace_s=api.shutdown_grace)
        await server.stop(api.shutdown_grace)
    _log.info("stopped")


def _found(tokenization: Tokenization) -> list[str]:
    """Return the models whose tokenizers are here, by name."""
    if tokenization.local is None:
        return []
    return sorted(found.model for found in tokenization.local.tokenizers.catalog.models())
