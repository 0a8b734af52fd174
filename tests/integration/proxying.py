"""A real proxy on a free loopback port, before embedded engines; who is preferred is the test's to say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, Protocol

import aiohttp
import msgspec
from prometheus_client import CollectorRegistry

from kvatlas.config import Seconds, TokenSettings
from kvatlas.config.proxy import ProxySettings
from kvatlas.discovery.health import Health, HealthLimits
from kvatlas.observe.metrics import Metrics
from kvatlas.observe.traces import Traces
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision, ProfileRun
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.outcome import Outcome
from kvatlas.route.plugins import Conclusion
from kvatlas.route.profile import Profile, WeightedScorer
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Router
from kvatlas.route.scheduler import NamedProducer, Scheduler
from kvatlas.serve.proxy.server import ProxyServer
from kvatlas.serve.routing.dispatch import Dispatcher, RoutingBounds
from kvatlas.serve.routing.metrics import RoutingMetrics
from kvatlas.tokens.setup import make_tokenization
from kvatlas.types import PodId

default_stack: Literal["auto", "native", "python"] = "auto"
"""The HTTP stack of proxies whose test names none; see the fixture ``each_stack``."""

COMPLETION = {"model": "tiny", "prompt": "one two three", "max_tokens": 4}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
JSON_HEADERS = {"content-type": "application/json"}


class Upstream(Protocol):
    """What a proxy can be put before."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...


class Preference:
    """Scores endpoints by the order in which they stand, first ones higher; tells matches, and keeps outcomes."""

    def __init__(self, matched_tokens: Mapping[str, int]) -> None:
        self.order: list[str] = []
        self.outcomes: list[tuple[str, Outcome]] = []
        self.one_more = asyncio.Event()
        """Set with every outcome."""
        self.decisions: list[Decision] = []
        self._matched_tokens = matched_tokens

    def produce(self, cycle: Cycle) -> None:
        if self._matched_tokens:
            found = {EndpointName(n): PrefixMatch(t, MatchSource.EVENTS) for n, t in self._matched_tokens.items()}
            cycle.matches["told"] = PrefixMatches(found, 16, 4)

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        return [1.0 / (1 + self.order.index(candidate.name)) for candidate in candidates]

    def finished(self, decision: Decision, endpoint: EndpointName, outcome: Outcome) -> None:
        self.decisions.append(decision)
        self.outcomes.append((endpoint, outcome))
        self.one_more.set()


class Best:
    """Picks the highest total."""

    def pick(self, cycle: Cycle, candidates: Sequence[Candidate], totals: Sequence[float]) -> list[Candidate]:
        return [max(zip(totals, candidates, strict=True), key=lambda pair: pair[0])[1]]


class OneProfile:
    """Runs the profile ``main``; ``prefill`` names who computes prompts."""

    def __init__(self, prefill: str | None) -> None:
        self._prefill = None if prefill is None else EndpointName(prefill)

    def next_profiles(self, cycle: Cycle, profiles: Mapping[str, Profile], runs: Mapping[str, ProfileRun | None]) -> list[str]:
        return [] if runs else ["main"]

    def conclude(self, cycle: Cycle, runs: Mapping[str, ProfileRun | None]) -> Conclusion:
        return Conclusion("main", self._prefill)


class Open:
    """Admits everybody."""

    async def admit(self, request: RouteRequest, body_bytes: int) -> None: ...

    def changed(self) -> None: ...


class Proxy:
    """A running proxy, and what it is made of."""

    def __init__(self, server: ProxyServer, router: Router, preference: Preference, health: Health, client: Any) -> None:
        self.server = server
        self.router = router
        self.preference = preference
        self.health = health
        self.client: aiohttp.ClientSession = client
        """Whose base URL is the proxy's."""

    @property
    def outcomes(self) -> list[tuple[str, Outcome]]:
        """Who had each request in the end, and how it went."""
        return self.preference.outcomes

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.server.url.rpartition("//")[2].rpartition(":")
        return host, int(port)

    def route_to(self, *endpoints: Endpoint) -> None:
        """Prefer the endpoints in this order."""
        self.preference.order = [endpoint.name for endpoint in endpoints]
        self.health.pool_changed(endpoints)
        self.router.set_endpoints(endpoints)

    async def until_finished(self, count: int) -> None:
        """Wait until so many requests have ended."""
        while len(self.outcomes) < count:
            self.preference.one_more.clear()
            await self.preference.one_more.wait()

    async def raw(self, request: bytes) -> bytes:
        """Send bytes over a connection of their own, and return all that comes until it is closed."""
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(request)
        try:
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()


def endpoint_of(engine: Upstream, name: str, **more: Any) -> Endpoint:
    pod = PodId(f"{engine.host}:{engine.port}")
    return Endpoint(name=EndpointName(name), address=engine.host, port=engine.port, pod=pod, **more)


@asynccontextmanager
async def proxy(
    *engines: Upstream,
    settings: Mapping[str, Any] | None = None,
    limits: HealthLimits | None = None,
    matched_tokens: Mapping[str, int] | None = None,
    prefill: str | None = None,
    admission: Any = None,
    bounds: RoutingBounds | None = None,
    traces: Traces | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Proxy]:
    """Run a proxy before engines, named e0, e1 and so on, preferred in this order.

    ``settings``: of ProxySettings; ``limits``, ``clock``: of the engines' health.
    """
    preference = Preference(matched_tokens or {})
    scheduler = Scheduler(
        (NamedProducer("told", preference),),
        {"main": Profile("main", (), (WeightedScorer("preference", preference),), Best())},
        OneProfile(prefill),
        failed=lambda name, error: None,
    )
    router = Router(scheduler, {"preference": preference})
    registry = CollectorRegistry()
    tokenization = make_tokenization(TokenSettings(), Metrics())
    metrics = RoutingMetrics(registry)
    dispatcher = Dispatcher(router, tokenization, admission or Open(), metrics, bounds or RoutingBounds(), traces)
    health = Health(limits, clock)
    defaults = ProxySettings(port=0, shutdown_grace=Seconds(5), stack=default_stack)
    server = ProxyServer(dispatcher, health, msgspec.structs.replace(defaults, **(settings or {})), registry)
    await server.start()
    try:
        async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(30)) as client:
            one = Proxy(server, router, preference, health, client)
            one.route_to(*(endpoint_of(engine, f"e{i}") for i, engine in enumerate(engines)))
            yield one
    finally:
        await server.stop(0)
        tokenization.close()
