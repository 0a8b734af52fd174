"""``kvatlas serve`` as a process of its own, and the questions that the demo asks it over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from kvatlas.backtest import RecordedRequest
from kvatlas.demo.captures import RecordedEngine
from kvatlas.errors import KvatlasError
from kvatlas.ingest.publisher import EventPublisher

START_TIMEOUT_S = 30.0
APPLY_TIMEOUT_S = 20.0
POLL_S = 0.002
STOP_TIMEOUT_S = 10.0


class DemoError(KvatlasError):
    """The demo cannot go on; says what it waited for, and the service's last log lines where there are any."""


class Service:
    """One ``kvatlas serve`` that connects to the given engines. ``port`` 0 takes a free one: see ``url`` once started."""

    def __init__(self, folder: Path, engines: Mapping[RecordedEngine, EventPublisher], port: int = 0) -> None:
        self.url = ""
        self.start_s = 0.0
        """How long it took to listen."""
        self._config = folder / "kvatlas.yaml"
        self._config.write_text(_yaml(engines, port), encoding="utf-8")
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._serving: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._last_lines: deque[str] = deque(maxlen=12)
        self._client = httpx.AsyncClient(timeout=10.0, trust_env=False)

    @property
    def command(self) -> Sequence[str]:
        """What is run: the command that stands beside this Python."""
        return (str(Path(sys.executable).with_name("kvatlas")), "serve", "--config", str(self._config))

    @property
    def port(self) -> int:
        return httpx.URL(self.url).port or 0

    async def __aenter__(self) -> Self:
        """Start it; returns when it listens. DemoError if it does not."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KVATLAS_")}
        began_s = time.monotonic()
        self._process = await asyncio.create_subprocess_exec(
            *self.command, env=environment, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        self._reader = asyncio.create_task(self._read_log(self._process))
        try:
            self.url = await asyncio.wait_for(asyncio.shield(self._serving), START_TIMEOUT_S)
        except TimeoutError:
            await self._stop()
            raise self._error(f"the service did not listen within {START_TIMEOUT_S:g} s") from None
        except BaseException:
            await self._stop()
            raise
        self.start_s = time.monotonic() - began_s
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        """Stop it as an operator would, with SIGTERM."""
        assert self._process is not None
        assert self._reader is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()
        await self._reader
        await self._client.aclose()

    def kill(self) -> None:
        """End it without a chance to say goodbye (SIGKILL)."""
        assert self._process is not None
        self._process.kill()

    async def applied(self, published: Mapping[str, int]) -> None:
        """Wait until all that was published is in the index: ``published`` frames by pod, and the pod fresh."""
        deadline_s = time.monotonic() + APPLY_TIMEOUT_S
        while True:
            pods = {pod["pod"]: pod for pod in (await self._ask("GET", "/v1/pods"))["pods"]}
            waiting = [name for name, count in published.items() if count and not _has_applied(pods.get(name), count)]
            if not waiting:
                return
            if time.monotonic() > deadline_s:
                state = {name: pods.get(name) for name in waiting}
                raise self._error(f"the service did not apply {published} within {APPLY_TIMEOUT_S:g} s: {state}")
            await asyncio.sleep(POLL_S)

    async def predict(self, engine: RecordedEngine, request: RecordedRequest) -> int:
        """Return how many tokens of a request the engine would find cached, as the service says."""
        body: dict[str, Any] = {"model": engine.model, "token_ids": request.token_ids.tolist()}
        if request.cache_salt is not None:
            body["cache_salt"] = request.cache_salt
        answer = await self._ask("POST", "/v1/score", body)
        return next((pod["predicted_cached_tokens"] for pod in answer["pods"] if pod["pod"] == engine.pod), 0)

    async def _ask(self, method: str, path: str, body: object = None) -> Any:
        try:
            answer = await self._client.request(method, self.url + path, json=body)
        except httpx.HTTPError as error:
            raise self._error(f"{method} {path} failed: {error!r}") from error
        if answer.status_code != httpx.codes.OK:
            raise self._error(f"{method} {path} was answered with {answer.status_code}: {answer.text}")
        return answer.json()

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        """Follow the service's log: it says where it listens."""
        assert process.stderr is not None
        async for raw in process.stderr:
            line = raw.decode("utf-8", "replace").rstrip()
            self._last_lines.append(line)
            if not self._serving.done() and (url := _address(line)):
                self._serving.set_result(url)
        if not self._serving.done():
            self._serving.set_exception(self._error("the service ended before it listened"))

    def _error(self, problem: str) -> DemoError:
        return DemoError("\n".join([problem, *(f"  service: {line}" for line in self._last_lines)]))


def _has_applied(pod: Mapping[str, Any] | None, frames: int) -> bool:
    return pod is not None and pod["next_seq"] == frames and pod["queue_depth"] == 0 and pod["state"] == "fresh"


def _address(line: str) -> str | None:
    """Return the HTTP address in the log line that tells it."""
    try:
        entry = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return None
    return entry.get("http") if isinstance(entry, dict) and entry.get("event") == "serving" else None


def _yaml(engines: Mapping[RecordedEngine, EventPublisher], port: int) -> str:
    """Return the service's configuration, as one would write it for real engines."""
    lines = ["api:", f"  port: {port}", "  grpcPort: 0", "zmq:", "  engines:"]
    for engine, publisher in engines.items():
        lines += [
            f"    - endpoint: {publisher.endpoint}",
            f"      replayEndpoint: {publisher.replay_endpoint}",
            f"      pod: {engine.pod}",
            f"      model: {engine.model}",
        ]
    return "\n".join(lines) + "\n"
