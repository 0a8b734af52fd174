"""``Fleet``: discovery, polls and health as one thing that keeps a router informed.

fleet = Fleet(make_discovery(settings), router, settings)
await fleet.run()  # until cancelled
fleet.health.healthy(endpoint)
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry

from kvatlas.config import EngineSettings
from kvatlas.config.route import RouteSettings
from kvatlas.discovery import Discovery
from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.discovery.file import FileDiscovery
from kvatlas.discovery.health import Health, HealthLimits, HealthState
from kvatlas.discovery.metrics import DiscoveryMetrics
from kvatlas.discovery.pace import PollLimits
from kvatlas.discovery.poller import Poller
from kvatlas.discovery.static import StaticDiscovery
from kvatlas.errors import ConfigError
from kvatlas.observe.logs import get_logger
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import EngineReport
from kvatlas.route.router import Router

log = get_logger("kvatlas.discovery")

Subscribe = Callable[[Sequence[EngineSettings]], None]


def make_discovery(
    settings: RouteSettings, metrics: DiscoveryMetrics, subscribe: Subscribe = lambda _engines: None
) -> Discovery:
    """Return the discovery that settings ask for. ConfigError where they ask for none, or for several.

    ``subscribe``: told of the engines whose events the description names, before its endpoints.
    """
    sources = settings.endpoint_sources
    if len(sources) != 1:
        problem = "is given beside another source of endpoints" if sources else "is missing"
        raise ConfigError("route.endpoints", problem, "one of route.endpoints, route.endpointsFile and route.kubernetes")
    if settings.endpoints_file is not None:
        return FileDiscovery(
            Path(settings.endpoints_file),
            watch=settings.watch_file,
            interval_s=settings.watch_interval,
            subscribe=subscribe,
            failed=metrics.failed,
        )
    if sources == ("route.kubernetes",):
        from kvatlas.discovery.kubernetes import KubernetesDiscovery

        return KubernetesDiscovery(settings.kubernetes, failed=metrics.failed)
    pool = pool_from_urls(settings.endpoints, "route.endpoints")
    subscribe(pool.engines)
    return StaticDiscovery(pool.endpoints)


class Fleet:
    """Tells a router who is there and how busy they say they are, and everybody who is healthy."""

    def __init__(
        self,
        discovery: Discovery,
        router: Router,
        settings: RouteSettings,
        metrics: DiscoveryMetrics | None = None,
        *,
        told: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``told``: called when the router was told something. ``clock``: the router's. ``tls``: for engines with HTTPS."""
        self._discovery = discovery
        self._router = router
        self._told = told
        self._metrics = metrics or DiscoveryMetrics(CollectorRegistry())
        self.health = Health(_health_limits(settings), clock, _tell_health)
        self.poller = Poller(
            self._report, health=self.health, observe=self._metrics.polled, limits=_poll_limits(settings), clock=clock, tls=tls
        )
        self.found = asyncio.Event()
        """Set once endpoints were told, be there any or none."""
        self._metrics.watch(self.health.states)

    async def run(self) -> None:
        """Keep the router informed until cancelled. Raises ConfigError where discovery cannot begin."""
        polls = asyncio.create_task(self.poller.run())
        finding = asyncio.create_task(self._discovery.run(self._changed))
        try:
            await asyncio.wait({polls, finding}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (polls, finding):
                task.cancel()
            ended = await asyncio.gather(polls, finding, return_exceptions=True)
        for failure in ended:
            if isinstance(failure, BaseException) and not isinstance(failure, asyncio.CancelledError):
                raise failure

    def _changed(self, endpoints: Sequence[Endpoint]) -> None:
        self._metrics.changed()
        self._router.set_endpoints(endpoints)
        self.health.pool_changed(endpoints)
        self.poller.set_endpoints(endpoints)
        self.found.set()
        self._told()

    def _report(self, endpoint: EndpointName, report: EngineReport) -> None:
        self._router.report(endpoint, report)
        self._told()


def _tell_health(endpoint: EndpointName, state: HealthState) -> None:
    (log.info if state is HealthState.HEALTHY else log.warning)("endpoint health", endpoint=endpoint, state=state.value)


def _poll_limits(settings: RouteSettings) -> PollLimits:
    polls = settings.polls
    return PollLimits(polls.interval, polls.timeout, polls.backoff_max, polls.at_once_max, polls.page_bytes_max)


def _health_limits(settings: RouteSettings) -> HealthLimits:
    health = settings.health
    return HealthLimits(health.failures_max, health.retry_after, health.polls_failed_max)
