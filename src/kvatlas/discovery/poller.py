"""Polls engines' metrics, beside routing and never in its way: decisions see the last report, however old it is."""

from __future__ import annotations

import asyncio
import random as random_module
import ssl
import time
from collections.abc import Callable, Sequence

import aiohttp
import msgspec

from kvatlas.discovery.engine_metrics import EngineMetricsError, read_figures
from kvatlas.discovery.health import Health
from kvatlas.discovery.pace import PollLimits, PollOutcome, wait_s
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import EngineReport

KEPT_S = 3.0
"""How long an idle connection is kept: less than the 5 s of vLLM's server, which would close it under a request."""

_HEADERS = {"Accept": "text/plain; version=0.0.4", "Accept-Encoding": "identity", "User-Agent": "kvatlas"}

Report = Callable[[EndpointName, EngineReport], None]
Observe = Callable[[PollOutcome, float], None]


class PollState(msgspec.Struct, frozen=True):
    """How polling an endpoint goes."""

    reported_at_s: float | None = None
    """The last success, on the poller's clock."""
    failures: int = 0
    """Since then, in a row."""
    problem: str | None = None
    """What went wrong last, while it does."""


class Poller:
    """Asks every engine again and again, one request at a time; endpoints behind one address share it.

    ``report`` is given what engines say (``Router.report``), ``health`` whether they are there, ``observe`` each poll's outcome
    and seconds. All methods belong to the event loop that :meth:`run` runs on.
    """

    def __init__(
        self,
        report: Report,
        *,
        health: Health | None = None,
        observe: Observe = lambda _outcome, _seconds: None,
        limits: PollLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: random_module.Random | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``clock``: the router's. ``tls``: for engines that serve HTTPS; by default certificates are checked as usual."""
        self._report = report
        self._health = health
        self._observe = observe
        self._limits = limits or PollLimits()
        self._clock = clock
        self._random = random or random_module.Random()  # noqa: S311  spreads load, guards nothing
        self._tls = tls
        self._targets: dict[tuple[str, str], _Target] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._session: aiohttp.ClientSession | None = None
        self._places = asyncio.Semaphore(self._limits.at_once_max)

    def set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """Poll these from now on, and nobody else."""
        members: dict[tuple[str, str], list[Endpoint]] = {}
        for endpoint in endpoints:
            members.setdefault((endpoint.metrics_url, endpoint.engine), []).append(endpoint)
        for gone in self._targets.keys() - members.keys():
            del self._targets[gone]
            if (task := self._tasks.pop(gone, None)) is not None:
                task.cancel()
        for key, sharing in members.items():
            target = self._targets.setdefault(key, _Target(*key))
            target.members = tuple(sharing)
        self._start()

    def states(self) -> dict[EndpointName, PollState]:
        """Return how polling goes, by endpoint."""
        return {one.name: target.state for target in self._targets.values() for one in target.members}

    async def run(self) -> None:
        """Poll until cancelled."""
        connector = aiohttp.TCPConnector(
            limit=0, limit_per_host=0, keepalive_timeout=KEPT_S, ssl=True if self._tls is None else self._tls
        )
        timeout = aiohttp.ClientTimeout(total=2 * self._limits.timeout_s, sock_connect=self._limits.timeout_s)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=_HEADERS, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        ) as self._session:
            try:
                async with asyncio.TaskGroup() as self._group:
                    self._start()
                    await asyncio.Event().wait()
            finally:
                self._group = None
                self._tasks.clear()

    def _start(self) -> None:
        if self._group is not None:
            for key in self._targets.keys() - self._tasks.keys():
                self._tasks[key] = self._group.create_task(self._poll_on(self._targets[key]))

    async def _poll_on(self, target: _Target) -> None:
        await asyncio.sleep(self._random.uniform(0.0, self._limits.interval_s))  # not all engines in the same moment
        while True:
            async with self._places:
                began_s = self._clock()
                outcome, problem = await self._poll(target)
                took_s = self._clock() - began_s
            self._observe(outcome, took_s)
            target.ended(outcome, problem, self._clock())
            if self._health is not None and outcome.reached is not None:
                for endpoint in target.members:
                    self._health.polled(endpoint.name, outcome.reached)
            await asyncio.sleep(wait_s(self._limits, took_s, target.state.failures, self._random))

    async def _poll(self, target: _Target) -> tuple[PollOutcome, str | None]:
        """Ask once, and report what was said. Returns what came of it, and what was wrong."""
        try:
            self._tell(target, await self._fetch(target.url))
        except _FailedError as failed:
            return failed.outcome, failed.problem
        except EngineMetricsError as error:
            return PollOutcome.GARBAGE, str(error)
        return PollOutcome.REPORTED, None

    async def _fetch(self, url: str) -> bytes:
        """Return a metrics page. Raises _FailedError."""
        assert self._session is not None
        try:
            async with self._session.get(url, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise _FailedError(PollOutcome.REFUSED, f"answers with status {answer.status}")
                return await self._read(answer.content)
        except aiohttp.ConnectionTimeoutError:
            raise _FailedError(PollOutcome.UNREACHABLE, "cannot be connected to in time") from None
        except TimeoutError:
            raise _FailedError(PollOutcome.LATE, "does not answer in time") from None
        except (aiohttp.ClientResponseError, ValueError) as error:  # no HTTP, or a URL that is none
            raise _FailedError(PollOutcome.GARBAGE, f"{type(error).__name__}: {error}"[:200]) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _FailedError(PollOutcome.UNREACHABLE, f"{type(error).__name__}: {error}"[:200]) from None

    def _tell(self, target: _Target, page: bytes) -> None:
        """Report what a page says of each endpoint. Raises EngineMetricsError, of a rank after the others are reported."""
        figures = read_figures(page, target.engine)
        missing = None
        for endpoint in target.members:
            try:
                report = figures.report(self._clock(), endpoint.dp_rank if endpoint.names_rank else None)
            except EngineMetricsError as error:
                missing = error
            else:
                self._report(endpoint.name, report)
        if missing is not None:
            raise missing

    async def _read(self, content: aiohttp.StreamReader) -> bytes:
        page = bytearray()
        async for chunk in content.iter_any():
            page += chunk
            if len(page) > self._limits.page_bytes_max:
                raise _FailedError(PollOutcome.GARBAGE, f"answers with more than {self._limits.page_bytes_max} bytes")
        return bytes(page)


class _FailedError(Exception):
    def __init__(self, outcome: PollOutcome, problem: str) -> None:
        self.outcome = outcome
        self.problem = problem
        super().__init__(problem)


class _Target:
    """One metrics page, and the endpoints that it tells of."""

    __slots__ = ("engine", "members", "state", "url")

    def __init__(self, url: str, engine: str) -> None:
        self.url = url
        self.engine = engine
        self.members: tuple[Endpoint, ...] = ()
        self.state = PollState()

    def ended(self, outcome: PollOutcome, problem: str | None, now_s: float) -> None:
        if outcome is PollOutcome.REPORTED:
            self.state = PollState(now_s)
        else:
            self.state = PollState(self.state.reported_at_s, self.state.failures + 1, problem)
