"""The endpoint picker as a server: which gRPC stack carries it, readiness on a port of its own, and a graceful stop."""

from __future__ import annotations

import asyncio
from typing import Protocol

import grpc
from prometheus_client import CollectorRegistry

from kvatlas.config.extproc import ExtProcSettings
from kvatlas.netloc import netloc
from kvatlas.observe.logs import get_logger
from kvatlas.serve.extproc.health import HealthChecks
from kvatlas.serve.extproc.metrics import ExtProcMetrics
from kvatlas.serve.extproc.python import PythonStack
from kvatlas.serve.grpc import take_port
from kvatlas.serve.routing.dispatch import Dispatcher
from kvatlas.serve.stacks import is_native

_log = get_logger(__name__)


class Stack(Protocol):
    """Serves Envoy's streams, and health checks on the same port. Of one event loop."""

    def bind(self) -> int:
        """Take the port and return it. Raises ConfigError where it cannot be had."""
        ...

    async def start(self) -> None:
        """Begin to serve. Not ready until :meth:`set_ready`."""
        ...

    async def set_ready(self, ready: bool) -> None:
        """Let health checks say whether requests should be sent here."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Take no new streams, let those in progress finish within the grace, then cut them off."""
        ...


class ExtProcServer:
    """Both ports. Must be made in the event loop that it runs in."""

    def __init__(self, settings: ExtProcSettings, dispatcher: Dispatcher, registry: CollectorRegistry) -> None:
        """Raises ConfigError where the stack cannot be had that settings ask for."""
        self._settings = settings
        self._stack = choose_stack(settings, dispatcher, ExtProcMetrics(registry))
        self._health = HealthChecks()
        self._checks = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._health.add_to(self._checks)

    def bind(self) -> tuple[int, int]:
        """Take both ports and return them. Raises ConfigError where one cannot be had."""
        port = self._stack.bind()
        health = netloc(self._settings.host, self._settings.health_port)
        return port, take_port(self._checks, "extProc.healthPort", health, None)

    async def start(self) -> None:
        """Begin to serve. Not ready until :meth:`set_ready`."""
        await self._health.start()
        await self._stack.start()
        await self._checks.start()
        _log.info("endpoint picker", stack="python" if isinstance(self._stack, PythonStack) else "native")

    async def set_ready(self, ready: bool) -> None:
        """Let health checks say whether requests should be sent here."""
        await self._stack.set_ready(ready)
        await self._health.set_ready(ready)

    async def drain(self) -> None:
        """Say that it stops, and go on for as long as Envoy may take to know."""
        await self.set_ready(False)
        await asyncio.sleep(self._settings.drain_delay)

    async def stop(self, grace_s: float | None = None) -> None:
        """Let requests in progress finish within the grace (extProc.shutdownGrace), then cut them off."""
        await self._stack.stop(self._settings.shutdown_grace if grace_s is None else grace_s)
        await self._checks.stop(None)


def choose_stack(settings: ExtProcSettings, dispatcher: Dispatcher, metrics: ExtProcMetrics) -> Stack:
    """Return the gRPC stack that settings ask for."""
    tls = settings.tls_cert_file is not None or settings.tls_key_file is not None
    if not is_native("extProc", settings.stack, tls=tls):
        return PythonStack(settings, dispatcher, metrics)
    from kvatlas.serve.extproc.native import NativeStack

    return NativeStack(settings, dispatcher, metrics)
