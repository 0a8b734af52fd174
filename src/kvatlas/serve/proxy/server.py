"""The proxy as a server: which HTTP stack carries it, readiness, and a graceful stop."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from kvatlas.config.proxy import ProxySettings
from kvatlas.discovery.health import Health
from kvatlas.observe.logs import get_logger
from kvatlas.serve.proxy.call import Stack
from kvatlas.serve.proxy.handler import ProxyHandler
from kvatlas.serve.proxy.metrics import ProxyMetrics
from kvatlas.serve.proxy.python import PythonStack
from kvatlas.serve.routing.dispatch import Dispatcher
from kvatlas.serve.stacks import is_native

_log = get_logger(__name__)


class ProxyServer:
    """Serves between :meth:`start` and :meth:`stop`, in one event loop."""

    def __init__(
        self, dispatcher: Dispatcher, health: Health, settings: ProxySettings, registry: CollectorRegistry, *, tls: bool = False
    ) -> None:
        """``tls``: some engine is known to want it. Raises ConfigError for files or a stack that can't be used."""
        self._settings = settings
        self._stack = choose_stack(settings, tls=tls)
        metrics = ProxyMetrics(registry)
        self._handler = ProxyHandler(dispatcher, health, self._stack, settings, metrics)
        metrics.observe(lambda: self._handler.in_progress)

    @property
    def url(self) -> str:
        """Where it listens, once started."""
        return self._stack.url

    @property
    def in_progress(self) -> int:
        """Requests admitted and not answered to the end."""
        return self._handler.in_progress

    async def start(self) -> None:
        """Listen. Raises ConfigError where the address cannot be had."""
        await self._stack.start(self._handler.handle)
        _log.info("proxy", url=self.url, stack="python" if isinstance(self._stack, PythonStack) else "native")

    def drain(self) -> None:
        """Say in readiness that it stops, and refuse new requests; those in progress go on."""
        self._handler.draining = True

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no new connections, let requests in progress finish within the grace (proxy.shutdownGrace), then cut them."""
        self.drain()
        await self._stack.stop(self._settings.shutdown_grace if grace_s is None else grace_s)


def choose_stack(settings: ProxySettings, *, tls: bool = False) -> Stack:
    """Return the HTTP stack that settings ask for."""
    tls = tls or settings.tls_cert_file is not None or settings.engine_ca_file is not None
    if not is_native("proxy", settings.stack, tls=tls):
        return PythonStack(settings)
    from kvatlas.serve.proxy.native import NativeStack

    return NativeStack(settings)
