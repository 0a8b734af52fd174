"""From settings to a router with everything around it: endpoints found and polled, requests admitted, front doors opened."""

from __future__ import annotations

import asyncio
import os

import msgspec
from prometheus_client import CollectorRegistry

from kvatlas.config import Config
from kvatlas.discovery.fleet import Fleet, make_discovery
from kvatlas.discovery.metrics import DiscoveryMetrics
from kvatlas.indexer import Indexer
from kvatlas.observe.logs import get_logger
from kvatlas.observe.traces import traces_from
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.log import DecisionLog
from kvatlas.route.picker_config import PickerConfig, build_router, in_file
from kvatlas.route.plugins import Noted
from kvatlas.route.router import Router
from kvatlas.serve.admission import admission_of
from kvatlas.serve.extproc.server import ExtProcServer
from kvatlas.serve.proxy.server import ProxyServer
from kvatlas.serve.routing.admission_metrics import AdmissionMetrics
from kvatlas.serve.routing.dispatch import Dispatcher, RoutingBounds
from kvatlas.serve.routing.http import RoutingRoutes
from kvatlas.serve.routing.metrics import RoutingMetrics
from kvatlas.serve.routing.picker import adopt, picker_of
from kvatlas.serve.routing.producer_metrics import ProducersCollector
from kvatlas.serve.routing.sharing import Sharing
from kvatlas.serve.workers.worker import Worker
from kvatlas.tokens.tokenization import Tokenization

NAMES_SHOWN = 16

_log = get_logger(__name__)


def read_picker(config: Config) -> tuple[Config, PickerConfig]:
    """Return what decides, and the settings with what that says of them. Raises ConfigError for a picker configuration that
    is none."""
    picker = picker_of(config.route)
    adopted, notes = adopt(config, picker)
    for note in (*picker.notes, *notes):
        _log.info("picker configuration", note=note)
    return adopted, picker


class DoorAddresses(msgspec.Struct, frozen=True):
    """Where front doors listen; None: not open."""

    proxy: str | None = None
    ext_proc: str | None = None


class Routing:
    """The route layer of a running service: one router, what keeps it informed, and its front doors. Of one event loop."""

    def __init__(self, config: Config, indexer: Indexer, tokenization: Tokenization, picker: PickerConfig) -> None:
        """Raises ConfigError where plugins do not fit together, and where nobody is named to route to."""
        settings = config.route
        registry = indexer.metrics.registry
        self._config = config
        self._metrics = RoutingMetrics(registry, log_ends=settings.decision_log)
        waiting = AdmissionMetrics(registry)
        with in_file(settings.picker_config):
            self.router = build_router(
                picker,
                index=indexer,
                failed=self._producer_failed,
                healthy=self._healthy,
                log=DecisionLog(settings.decisions_kept),
            )
            self._admission = admission_of(
                self.router, picker.flow_control, flow_control=picker.flow_control_on, observer=waiting
            )
        _show_plugins(self.router, registry)
        waiting.watch(self._admission.stats)
        discovery_metrics = DiscoveryMetrics(registry)
        self._fleet = Fleet(
            make_discovery(settings, discovery_metrics, subscribe=indexer.follow),
            self.router,
            settings,
            discovery_metrics,
            told=self._admission.changed,
        )
        shares = settings.peers or settings.peers_listen
        self._sharing = Sharing(self.router, settings, registry, told=self._admission.changed) if shares else None
        bounds = RoutingBounds(
            tokens_timeout_s=settings.tokens_timeout,
            priorities=settings.objectives,
            tokenizers=config.tokens.models.keys(),
            aliases=config.models,
            orca=settings.orca,
        )
        self._traces = traces_from(os.environ)
        self._dispatcher = dispatcher = Dispatcher(
            self.router, tokenization, self._admission, self._metrics, bounds, self._traces
        )
        doors = settings.front_doors
        tls = any(url.startswith("https:") for url in settings.endpoints)
        proxy = "proxy" in doors
        self._proxy = ProxyServer(dispatcher, self._fleet.health, config.proxy, registry, tls=tls) if proxy else None
        self._picker = ExtProcServer(config.ext_proc, dispatcher, registry) if "ext-proc" in doors else None
        self._informed: asyncio.Task[None] | None = None

    async def start(self) -> DoorAddresses:
        """Find endpoints, then open the front doors. Raises ConfigError where that cannot be done."""
        self._informed = asyncio.create_task(self._fleet.run())
        found = asyncio.create_task(self._fleet.found.wait())
        await asyncio.wait({self._informed, found}, return_when="FIRST_COMPLETED")
        found.cancel()
        if self._informed.done():
            self._informed.result()
        names = [endpoint.name for endpoint in self.router.endpoints]
        _log.info("endpoints", count=len(names), names=names[:NAMES_SHOWN])
        if self._sharing is not None:
            self._sharing.start()
        addresses = DoorAddresses()
        if self._proxy is not None:
            await self._proxy.start()
            addresses = DoorAddresses(self._proxy.url)
        if self._picker is not None:
            port, _ = self._picker.bind()
            await self._picker.start()
            addresses = msgspec.structs.replace(addresses, ext_proc=f"{self._config.ext_proc.host}:{port}")
        return addresses

    async def set_ready(self, ready: bool) -> None:
        """Let Envoy's health checks say whether requests should be sent here."""
        if self._picker is not None:
            await self._picker.set_ready(ready)

    async def stop(self, *, at_once: bool = False) -> None:
        """Close the front doors: requests in progress finish within their grace, those that wait for admission are refused."""
        if self._picker is not None and not at_once:
            await self._picker.drain()
        self._admission.close()
        doors = []
        if self._proxy is not None:
            doors.append(self._proxy.stop(0.0 if at_once else None))
        if self._picker is not None:
            doors.append(self._picker.stop(0.0 if at_once else None))
        await asyncio.gather(*doors)
        if self._sharing is not None:
            await self._sharing.close()
        if self._informed is not None:
            self._informed.cancel()
            await asyncio.gather(self._informed, return_exceptions=True)
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    @property
    def in_progress(self) -> int:
        """Routed requests on their way."""
        return sum(self.router.load(endpoint.name).in_flight.requests for endpoint in self.router.endpoints)

    def routes(self, worker: Worker | None) -> RoutingRoutes:
        """Return what shows the router over HTTP. ``worker``: which of several processes this is."""
        return RoutingRoutes(self.router, self.health, worker, self._dispatcher.preview, self._config.api.body_bytes_max)

    def health(self, name: EndpointName) -> str:
        """Return an endpoint's state (HealthState)."""
        return self._fleet.health.state(name).value

    def _healthy(self, name: EndpointName) -> bool:
        return self._fleet.health.healthy(name)

    def _producer_failed(self, name: str, error: Exception) -> None:
        self._metrics.producer_failed(name, error)
        _log.warning("prefixes could not be matched", producer=name, error=f"{type(error).__name__}: {error}"[:500])


def _show_plugins(router: Router, registry: CollectorRegistry) -> None:
    """Log what plugins have to say of their parameters, and show producers' sizes in metrics."""
    for name, plugin in router.plugins.items():
        for note in plugin.notes if isinstance(plugin, Noted) else ():
            _log.info("plugin", plugin=name, note=note)
    producers = ProducersCollector()
    producers.watch(router.plugins)
    registry.register(producers)
