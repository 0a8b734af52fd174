"""The demo's course: fleet up, traffic, one engine killed, another added, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec

from kvatlas.demo.fleet import Fleet, Router
from kvatlas.demo.keys import pressed
from kvatlas.demo.screen import Screen
from kvatlas.demo.tally import Tally
from kvatlas.demo.trace import sessions
from kvatlas.demo.turns import InTurns
from kvatlas.demo.users import Traffic
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.live.choice import SMALL
from kvatlas.sim.live.tokens import packaged_tokenizer

KILL_AT, JOIN_AT = 0.3, 0.5
"""Of the run. An engine takes some seconds to start: it takes part in the last third."""
TICK_S = 0.25
ENGINES_MAX = 32
REQUESTS_MAX = 100_000
"""Beyond so many even a run with --stay ends: all of them are kept for the sums."""


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How long, and how large."""

    engines: int = 4
    users: int = 8
    seconds: float = 36.0
    requests: int | None = None
    """Instead of a time."""
    chaos: bool = True
    """Kill an engine, and add one."""
    stay: bool = False
    """Go on until Ctrl-C."""
    seed: int = 1
    spec: EngineSpec = SMALL


async def run(options: DemoOptions, screen: Screen) -> bool:
    """Run the demo. Return whether it showed what it promises. DemoError where a process does not do its part."""
    with tempfile.TemporaryDirectory(prefix="kvatlas-demo-") as folder, packaged_tokenizer() as tokenizer:
        fleet = Fleet(Path(folder), tokenizer, options.spec)
        screen.begin(options.engines)
        try:
            began_s = time.monotonic()
            router = await fleet.start(options.engines)
            screen.up(router, fleet.engines, await _dashboard(router), time.monotonic() - began_s, stay=options.stay)
            course = _Course(options, fleet, router, screen)
            await course.run()
        finally:
            await fleet.stop()
    screen.summary(course.tally, fleet.engines)
    return course.tally.holds


class _Course:
    """One run, from the first request to the last."""

    def __init__(self, options: DemoOptions, fleet: Fleet, router: Router, screen: Screen) -> None:
        self._options = options
        self._fleet = fleet
        self._router = router
        self._screen = screen
        self._in_turns = InTurns(options.spec.block_size_tokens, options.spec.gpu_blocks)
        self.tally = Tally(self._in_turns)
        self._began_s = time.monotonic()
        self._stop = asyncio.Event()
        self._joins: set[asyncio.Task[None]] = set()
        for engine in fleet.engines:
            self._in_turns.join(engine.name)

    @property
    def _progress(self) -> float:
        if self._options.requests is not None:
            return len(self.tally.sent) / self._options.requests
        return (time.monotonic() - self._began_s) / self._options.seconds

    async def run(self) -> None:
        traffic = Traffic(self._router, sessions(self._options.seed), self._options.seed, self.tally.add)
        with self._signals(), pressed({"k": self._kill, "a": self._join, "q": self._stop.set}), self._screen.live() as show:
            users = asyncio.create_task(traffic.run(self._options.users))
            try:
                await self._watch(
                    users, lambda: show(self.tally, self._fleet.engines, None if self._options.stay else self._progress)
                )
                traffic.end()
                await users
            finally:
                users.cancel()
                for join in self._joins:
                    join.cancel()
                await asyncio.gather(users, *self._joins, return_exceptions=True)

    async def _watch(self, users: asyncio.Task[None], show: Callable[[], None]) -> None:
        """Look after the fleet until the run is over."""
        acts = [(KILL_AT, self._kill), (JOIN_AT, self._join)] if self._options.chaos else []
        while not self._stop.is_set() and len(self.tally.sent) < REQUESTS_MAX:
            self._fleet.check()
            for task in (users, *self._joins):
                if task.done():
                    task.result()
            self._joins = {join for join in self._joins if not join.done()}
            while acts and self._progress >= acts[0][0]:
                acts.pop(0)[1]()
            show()
            if self._progress >= 1 and not acts and not self._joins and not self._options.stay:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), TICK_S)

    def _kill(self) -> None:
        """Kill the engine that had most requests; the last one stays."""
        running = self._fleet.running
        if len(running) > 1:
            victim = max(running, key=lambda engine: self.tally.engine(engine.name).requests)
            victim.kill()
            self._in_turns.leave(victim.name)
            self._screen.killed(victim, time.monotonic() - self._began_s)

    def _join(self) -> None:
        if len(self._fleet.running) + len(self._joins) < ENGINES_MAX:
            self._joins.add(asyncio.create_task(self._joined()))

    async def _joined(self) -> None:
        began_s = time.monotonic()
        engine = await self._fleet.join(self._router)
        self._in_turns.join(engine.name)
        self._screen.joined(engine, began_s - self._began_s, time.monotonic() - began_s)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the run, with its sums."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._stop.set)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


async def _dashboard(router: Router) -> str | None:
    """Return the dashboard's address, where the service has one."""
    url = f"{router.api}/dashboard"
    async with httpx.AsyncClient(trust_env=False, follow_redirects=True, timeout=10.0) as client:
        try:
            return url if (await client.get(url)).status_code == httpx.codes.OK else None
        except httpx.HTTPError:
            return None
