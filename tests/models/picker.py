"""An endpoint picker for tests and benchmarks: the real one over a router with the simplest policy, on free ports.

As a process: ``python -m tests.models.picker --port 9002 10.0.0.1:8000 10.0.0.2:8000``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from kvatlas.config.extproc import ExtProcSettings
from kvatlas.errors import RouteError
from kvatlas.observe.metrics import Metrics
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision, ProfileRun
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.outcome import Outcome
from kvatlas.route.plugins import Conclusion
from kvatlas.route.profile import Profile
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Router
from kvatlas.route.scheduler import Scheduler
from kvatlas.serve.extproc.server import ExtProcServer
from kvatlas.serve.routing.dispatch import Dispatcher, RoutingBounds
from kvatlas.serve.routing.metrics import RoutingMetrics
from kvatlas.tokens.tokenization import Tokenization
from kvatlas.types import PodId

default_stack = "auto"
"""What pickers run on that are not told otherwise (extProc.stack)."""


class OnlyProfile:
    """A handler for one profile."""

    def next_profiles(
        self, _cycle: Cycle, profiles: Mapping[str, Profile], runs: Mapping[str, ProfileRun | None]
    ) -> Sequence[str]:
        return () if runs else tuple(profiles)

    def conclude(self, _cycle: Cycle, _runs: Mapping[str, ProfileRun | None]) -> Conclusion:
        return Conclusion("default")


class Turns:
    """A picker: one candidate after the other, or as many as ``targets`` says."""

    def __init__(self, targets: int = 1) -> None:
        self.targets = targets
        self._turn = 0

    def pick(self, _cycle: Cycle, candidates: Sequence[Candidate], _totals: Sequence[float]) -> Sequence[Candidate]:
        self._turn += 1
        start = self._turn % len(candidates)
        return [*candidates[start:], *candidates[:start]][: self.targets]


class Outcomes:
    """Keeps how requests went, and puts a header on responses."""

    def __init__(self) -> None:
        self.seen: list[tuple[EndpointName, Outcome]] = []
        self.changed = asyncio.Event()

    def finished(self, _decision: Decision, endpoint: EndpointName, outcome: Outcome) -> None:
        self.seen.append((endpoint, outcome))
        self.changed.set()

    def response_headers(self, decision: Decision, endpoint: EndpointName) -> Mapping[str, str]:
        return {"x-decided-for": decision.target.name}

    async def count(self, number: int) -> list[tuple[EndpointName, Outcome]]:
        """Wait until so many requests have ended; return them."""
        while len(self.seen) < number:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 20)
        return self.seen


class Gatekeeper:
    """Admission that does as it is told."""

    def __init__(self) -> None:
        self.error: RouteError | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.arrived = asyncio.Event()
        """A request asked."""
        self.given_up = asyncio.Event()
        """A request did not wait for its answer."""

    async def admit(self, _request: RouteRequest, _body_bytes: int) -> None:
        self.arrived.set()
        if self.error is not None:
            raise self.error
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.given_up.set()
            raise

    def changed(self) -> None:
        pass


class Picker:
    """Everything behind the ports, and the server in front of it, which can be stopped and started again."""

    def __init__(self, authorities: Sequence[str], *, orca: bool = False, **settings: Any) -> None:
        """``orca``: ask engines for their load. ``settings``: of ExtProcSettings."""
        own = {"stack": default_stack, "port": 0, "health_port": 0, "shutdown_grace": 5.0, "drain_delay": 0.0}
        self.settings = {**own, **settings}
        self.outcomes = Outcomes()
        self.admission = Gatekeeper()
        self.turns = Turns()
        scheduler = Scheduler((), {"default": Profile("default", (), (), self.turns)}, OnlyProfile(), failed=lambda *_: None)
        self.router = Router(scheduler, {"outcomes": self.outcomes}, random=random.Random(0))
        self.set_endpoints(*authorities)
        metrics = RoutingMetrics(CollectorRegistry())
        bounds = RoutingBounds(orca=orca)
        self.dispatcher = Dispatcher(self.router, Tokenization([], Metrics()), self.admission, metrics, bounds)
        self.registry = CollectorRegistry()
        self.port = 0
        self.health_port = 0
        self._server: ExtProcServer | None = None

    def set_endpoints(self, *authorities: str) -> None:
        split = [authority.rpartition(":") for authority in authorities]
        self.router.set_endpoints(
            [
                Endpoint(name=EndpointName(f"default/{host}:{port}"), address=host, port=int(port), pod=PodId(host))
                for host, _, port in split
            ]
        )

    @property
    def in_flight(self) -> int:
        return sum(self.router.load(endpoint.name).in_flight.requests for endpoint in self.router.endpoints)

    async def start(self) -> None:
        self.registry = CollectorRegistry()
        self._server = ExtProcServer(ExtProcSettings(**self.settings), self.dispatcher, self.registry)
        self.port, self.health_port = self._server.bind()
        self.settings.update(port=self.port, health_port=self.health_port)
        await self._server.start()
        await self._server.set_ready(True)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.drain()
            await self._server.stop()
            self._server = None

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def picker(*authorities: str, **settings: Any) -> AsyncIterator[Picker]:
    """Run a picker for as long as the block lasts. ``settings``: of ExtProcSettings."""
    one = Picker(authorities, **settings)
    await one.start()
    try:
        yield one
    finally:
        await one.stop()


async def _serve(port: int, stack: str, authorities: Sequence[str]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with picker(*authorities, port=port, stack=stack) as one:
        one.outcomes.seen = _Nothing()
        print(one.port, flush=True)
        await stop.wait()


class _Nothing(list[tuple[EndpointName, Outcome]]):
    def append(self, _one: tuple[EndpointName, Outcome]) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--stack", default="auto")
    parser.add_argument("authorities", nargs="+")
    given = parser.parse_args()
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.install()
    asyncio.run(_serve(given.port, given.stack, given.authorities))


if __name__ == "__main__":
    main()
