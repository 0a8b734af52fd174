"""The demo's processes: engines that come and go, and the router before them."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec

from kvatlas.demo.processes import DemoError, Process, start
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.live.server import Started
from kvatlas.sim.spec_file import spec_text

MODEL = "tiny"
READY_S_MAX = 120.0
POLL_S = 0.05


class Engine:
    """One of the engines, which may have been killed."""

    def __init__(self, name: str, process: Process, started: Started) -> None:
        self.name = name
        self.process = process
        self.started = started
        self.listed = True
        """The router is told of it."""
        self.alive = True
        """It was not killed."""

    def kill(self) -> None:
        """End it as a crash would."""
        self.alive = False
        self.process.kill()


class Router(msgspec.Struct, frozen=True):
    """Where the router listens."""

    api: str
    proxy: str


class Fleet:
    """Engines and their router. ``folder``: for the files that they read. ``stop`` ends all of them."""

    def __init__(self, folder: Path, tokenizer: Path, spec: EngineSpec) -> None:
        self.engines: list[Engine] = []
        """All there were, in the order of their coming."""
        self._numbers = itertools.count(1)
        self._tokenizer = tokenizer
        self._endpoints = folder / "endpoints.json"
        self._spec = folder / "engine.yaml"
        self._spec.write_text(spec_text(spec), encoding="utf-8")
        self._router: Process | None = None
        self._client = httpx.AsyncClient(timeout=10.0, trust_env=False)

    @property
    def running(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.alive]

    async def start(self, engines: int) -> Router:
        """Start so many engines, and the router once they listen. DemoError where one of them does not."""
        begun = await asyncio.gather(*(self._start_engine() for _ in range(engines)), return_exceptions=True)
        for failure in begun:
            if isinstance(failure, BaseException):
                raise failure
        self.engines.sort(key=lambda engine: engine.name)
        self._write()
        arguments = ["route", "--endpoints-file", str(self._endpoints), "--port", "0", "--api-port", "0"]
        for setting in ("api.grpcPort=0", "zmq.bind=false", f"tokens.models.{MODEL}={self._tokenizer}"):
            arguments += ["--set", setting]
        self._router, told = await start("router", arguments, _serving)
        router = msgspec.json.decode(told, type=Router)
        await self._known(router)
        return router

    async def join(self, router: Router) -> Engine:
        """Start another engine, and tell the router: of the new one, and that those killed are gone."""
        engine = await self._start_engine()
        for one in self.engines:
            one.listed = one.alive
        self._write()
        await self._known(router)
        return engine

    async def stop(self) -> None:
        """End all processes."""
        processes = [engine.process for engine in self.engines] + ([self._router] if self._router else [])
        await asyncio.gather(*(process.stop() for process in processes))
        await self._client.aclose()

    def check(self) -> None:
        """Raise DemoError where the router has ended by itself."""
        if self._router is not None and not self._router.runs:
            raise self._router.error("it has ended")

    async def _start_engine(self) -> Engine:
        name = f"engine-{next(self._numbers)}"
        arguments = ["engine", "--json", "--port", "0", "--model", MODEL, "--pod", name]
        arguments += ["--spec", str(self._spec), "--tokenizer", str(self._tokenizer)]
        process, told = await start(name, arguments, lambda line: line if line.startswith("{") else None)
        engine = Engine(name, process, msgspec.json.decode(told, type=Started))
        self.engines.append(engine)
        return engine

    def _write(self) -> None:
        """Write who is there, as the router reads it."""
        entries = []
        for engine in self.engines:
            if engine.listed:
                address = urlsplit(engine.started.url)
                events = {"endpoint": engine.started.events, "replayEndpoint": engine.started.replay, "model": MODEL}
                entries.append(
                    {
                        "name": engine.name,
                        "address": address.hostname,
                        "port": str(address.port),
                        "pod": engine.name,
                        "kvEvents": events,
                    }
                )
        written = self._endpoints.with_suffix(".new")
        written.write_text(json.dumps({"endpoints": entries}, indent=1), encoding="utf-8")
        written.replace(self._endpoints)

    async def _known(self, router: Router) -> None:
        """Wait until the router knows exactly those that are listed and their load, and has its tokenizer."""
        wanted = {engine.name for engine in self.engines if engine.listed}
        try:
            async with asyncio.timeout(READY_S_MAX):
                while not await self._knows(router, wanted):
                    self.check()
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise DemoError(f"the router did not know {sorted(wanted)} within {READY_S_MAX:g} s") from None

    async def _knows(self, router: Router, wanted: set[str]) -> bool:
        try:
            if (await self._client.get(f"{router.api}/readyz")).status_code != httpx.codes.OK:
                return False
            answer = await self._client.get(f"{router.api}/v1/endpoints")
            listed = answer.raise_for_status().json()["endpoints"]
        except (httpx.HTTPError, ValueError, KeyError):
            return False
        known = {one["pod"]: one for one in listed}
        return known.keys() == wanted and all(one["load"].get("waiting") is not None for one in known.values())


def _serving(line: str) -> str | None:
    """Return the router's addresses in the log line that tells them."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or entry.get("event") != "serving":
        return None
    return json.dumps({"api": entry["http"], "proxy": entry["proxy"]})
