"""The ports: Envoy's calls on one, health checks on that and another."""

from __future__ import annotations

import asyncio
import ssl

from prometheus_client import CollectorRegistry

from kvatlas.config.extproc import ExtProcSettings
from kvatlas.errors import ConfigError
from kvatlas.serve.extproc.door import Door
from kvatlas.serve.h2.calls import Bounds
from kvatlas.serve.h2.health import Health
from kvatlas.serve.h2.server import GrpcServer
from kvatlas.serve.routing.dispatch import Dispatcher

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
LIVENESS = "liveness"
READINESS = ("", "readiness", SERVICE)
CONNECTIONS_MAX = 1024
"""An Envoy has one for each of its threads."""
MESSAGE_BYTES_SPARE = 1 << 20
"""What a message may hold beside a whole body."""

_CHECKS = Bounds(streams_max=100, message_bytes_max=4096)


class ExtProcServer:
    """Both ports. Of one event loop."""

    def __init__(self, settings: ExtProcSettings, dispatcher: Dispatcher, registry: CollectorRegistry) -> None:
        self._settings = settings
        self._tls = _tls(settings)
        self._health = Health()
        door = Door(settings, dispatcher, registry)
        # Calls beyond streamsMax are answered; beyond twice as many Envoy has to wait with them.
        bounds = Bounds(2 * settings.streams_max, settings.body_bytes_max + MESSAGE_BYTES_SPARE)
        methods = {f"/{SERVICE}/Process": door.process, **self._health.methods}
        self._picker = GrpcServer(methods, bounds, CONNECTIONS_MAX)
        self._checks = GrpcServer(self._health.methods, _CHECKS, CONNECTIONS_MAX)

    def bind(self) -> tuple[int, int]:
        """Take both ports and return them. Raises ConfigError where one cannot be had."""
        settings = self._settings
        return self._bind("port", self._picker, settings.port), self._bind("healthPort", self._checks, settings.health_port)

    async def start(self) -> None:
        """Begin to serve. Not ready until :meth:`set_ready`."""
        self._health.set(LIVENESS, True)
        await self.set_ready(False)
        await self._picker.start(self._tls)
        await self._checks.start()

    async def set_ready(self, ready: bool) -> None:
        """Let health checks say whether requests should be sent here."""
        for name in READINESS:
            self._health.set(name, ready)

    async def stop(self) -> None:
        """Say that it stops, wait until Envoy can know, let requests in progress finish within the grace, then cut them off."""
        await self.set_ready(False)
        await asyncio.sleep(self._settings.drain_delay)
        await self._picker.stop(self._settings.shutdown_grace)
        await self._checks.stop(0.0)

    def _bind(self, field: str, server: GrpcServer, port: int) -> int:
        try:
            return server.bind(self._settings.host, port)
        except OSError as error:
            problem = f"cannot listen on {self._settings.host}:{port}: {error.strerror}"
            raise ConfigError(f"extProc.{field}", problem, "a free port of this machine, or 0 for any") from None


def _tls(settings: ExtProcSettings) -> ssl.SSLContext | None:
    """Return what TLS needs; None: in clear. Raises ConfigError for files that cannot be used."""
    cert, key = settings.tls_cert_file, settings.tls_key_file
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        missing = "tlsCertFile" if cert is None else "tlsKeyFile"
        raise ConfigError(f"extProc.{missing}", "is missing", "extProc.tlsCertFile and extProc.tlsKeyFile, both or none")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        problem = f"{cert!r} and {key!r} cannot be used: {error}"
        raise ConfigError("extProc.tlsCertFile", problem, "a PEM certificate chain and its key") from None
    return context
