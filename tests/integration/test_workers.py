"""`kvatlas route --workers`: real processes behind one port, that die and stop without taking others along."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvatlas.sim.live.faults import Fault
from tests.models.embedded import Watched, engine

ATTEMPTS_MAX = 500
"""Of things that chance decides: which worker a connection reaches."""
SHARED = "You are a booking agent that knows every airline, and answers in one sentence. " * 30


class Workers:
    """A supervisor's process, and what it and its workers log."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self._more = asyncio.Condition()
        self._ended = False
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for text in self.process.stderr:
            async with self._more:
                self.lines.append(json.loads(text) if text.startswith(b"{") else {"event": "text", "text": text.decode()})
                self._more.notify_all()
        async with self._more:
            self._ended = True
            self._more.notify_all()

    async def line(self, event: str, where: Callable[[dict[str, Any]], bool] = lambda _line: True) -> dict[str, Any]:
        """Return the first line of an event, once it is there."""

        def found() -> list[dict[str, Any]]:
            return [one for one in self.lines if one["event"] == event and where(one)]

        async with self._more:
            await asyncio.wait_for(self._more.wait_for(lambda: bool(found()) or self._ended), 60)
        assert found(), self.lines
        return found()[0]

    async def ended(self) -> int:
        """Return the supervisor's status, once all its workers are gone too."""
        await asyncio.wait_for(self._reader, 60)
        return await self.process.wait()

    def pid(self, worker: int) -> int:
        started = [one for one in self.lines if one["event"] == "worker started" and one["worker"] == worker]
        return int(started[-1]["pid"])


@asynccontextmanager
async def workers(*options: str, count: int = 2) -> AsyncIterator[Workers]:
    command = [sys.executable, "-m", "kvatlas", "route", "--workers", str(count), "--port", "0", "--api-port", "0"]
    command += ["--set", "api.grpcPort=0", *options]
    started = Workers(await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE))
    try:
        yield started
    finally:
        if started.process.returncode is None:
            started.process.send_signal(signal.SIGTERM)
            started.process.send_signal(signal.SIGTERM)
        await started.ended()


class Clients:
    """Requests, each over a connection of its own, so that any worker may get it."""

    def __init__(self, serving: dict[str, Any]) -> None:
        self.proxy: str = serving["proxy"]
        self.apis: list[str] = serving["apis"]
        self.sent = 0

    async def ask(self, question: str = "hello", system: str = SHARED) -> httpx.Response:
        self.sent += 1
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        headers = {"connection": "close", "x-request-id": f"r{self.sent}", "x-kvatlas-explain": "1"}
        async with httpx.AsyncClient(base_url=self.proxy, timeout=30) as http:
            return await http.post(
                "/v1/chat/completions", json={"model": "tiny", "messages": messages, "max_tokens": 4}, headers=headers
            )

    async def get(self, worker: int, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.apis[worker], timeout=30) as http:
            return await http.get(path)

    async def decided(self, worker: int) -> int:
        return len((await self.get(worker, "/v1/decisions?limit=1000")).json()["decisions"])

    async def ask_until_decided_by(self, worker: int) -> httpx.Response:
        """Send requests until one more of them reached a worker; return that one's answer."""
        before = await self.decided(worker)
        for _ in range(ATTEMPTS_MAX):
            answer = await self.ask()
            if await self.decided(worker) > before:
                return answer
        raise AssertionError(f"{ATTEMPTS_MAX} connections, and none reached worker {worker}")


async def serving(running: Workers) -> Clients:
    return Clients(await running.line("workers serving"))


def named(*engines: Watched) -> list[str]:
    return [part for one in engines for part in ("--endpoint", one.url)]


async def test_requests_are_spread_over_workers_and_each_api_says_whose_it_is() -> None:
    async with engine() as one, workers(*named(one)) as running:
        clients = await serving(running)
        for worker in (0, 1):
            assert (await clients.ask_until_decided_by(worker)).status_code == 200
            answer = await clients.get(worker, "/v1/decisions")
            assert answer.headers["x-kvatlas-worker"] == f"{worker} of 2"
            refused = await clients.get(worker, "/v1/decisions?id=nobody")
            assert f"worker {worker} of 2" in refused.json()["error"]["remedy"]
            metrics = (await clients.get(worker, "/metrics")).text
            assert f'kvatlas_route_worker_starts{{worker="{worker}",workers="2"}} 1.0' in metrics


async def test_a_worker_that_is_killed_takes_no_other_requests_along_and_comes_back() -> None:
    async with engine() as one, workers(*named(one)) as running:
        clients = await serving(running)
        await clients.ask_until_decided_by(1)
        stop = asyncio.Event()
        statuses: list[int] = []

        async def load() -> None:
            while not stop.is_set():
                try:
                    statuses.append((await clients.ask()).status_code)
                except httpx.TransportError:
                    statuses.append(0)  # it was that worker's

        asking = [asyncio.create_task(load()) for _ in range(4)]
        os.kill(running.pid(1), signal.SIGKILL)
        await running.line("a worker died")
        since = len(statuses) + len(asking)  # what was on its way when it died may have failed
        await running.line("worker started", lambda line: line["starts"] == 2)
        stop.set()
        await asyncio.gather(*asking)
        assert set(statuses[since:]) <= {200}
        assert statuses.count(0) <= len(asking)
        back = await running.line("serving", lambda line: line["worker"] == 1 and line["http"] != clients.apis[1])
        clients.apis[1] = back["http"]
        assert (await clients.ask_until_decided_by(1)).status_code == 200
        assert 'kvatlas_route_worker_starts{worker="1",workers="2"} 2.0' in (await clients.get(1, "/metrics")).text


async def in_flight(clients: Clients, worker: int) -> int:
    endpoints = (await clients.get(worker, "/v1/endpoints")).json()["endpoints"]
    return sum(int(one["load"]["in_flight_requests"]) for one in endpoints)


async def test_what_one_worker_has_in_flight_counts_for_the_other_until_it_is_killed() -> None:
    async with engine() as one, workers("--set", "route.peersSilence=2s", *named(one)) as running:
        clients = await serving(running)
        one.fail(Fault("hang"))
        asking = [asyncio.create_task(clients.ask()) for _ in range(6)]
        await one.until(lambda engine: len(engine.requests) == len(asking))
        for worker in (0, 1):
            while await in_flight(clients, worker) != len(asking):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        os.kill(running.pid(1), signal.SIGKILL)
        answers = asyncio.gather(*asking, return_exceptions=True)
        await one.until(lambda engine: engine.cancelled == len([task for task in asking if task.done()]))
        while await in_flight(clients, 0) != len([task for task in asking if not task.done()]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        one.fail()
        assert {answer.status_code for answer in await answers if isinstance(answer, httpx.Response)} <= {200}


async def test_requests_in_progress_finish_before_workers_stop() -> None:
    async with engine() as one, workers(*named(one)) as running:
        clients = await serving(running)
        one.fail(Fault("hang"))
        asking = [asyncio.create_task(clients.ask()) for _ in range(6)]
        await one.until(lambda engine: len(engine.requests) == len(asking))
        running.process.send_signal(signal.SIGTERM)
        for worker in (0, 1):
            await running.line("stopping", lambda line, worker=worker: line["worker"] == worker)
        one.fail()
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * len(asking)
        assert await running.ended() == 0


async def test_a_second_signal_cuts_requests_in_progress() -> None:
    async with engine() as one, workers(*named(one)) as running:
        clients = await serving(running)
        one.fail(Fault("hang"))
        asking = asyncio.create_task(clients.ask())
        await one.until(lambda engine: len(engine.requests) == 1)
        running.process.send_signal(signal.SIGINT)
        await running.line("workers stopping")
        for worker in (0, 1):
            await running.line("stopping", lambda line, worker=worker: line["worker"] == worker)
        running.process.send_signal(signal.SIGINT)
        assert await running.ended() == 0
        await asyncio.gather(asking, return_exceptions=True)


async def test_workers_end_when_their_supervisor_is_killed_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "t"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    async with engine() as one, workers(*named(one)) as running:
        await serving(running)
        assert len(list(directory.iterdir())) == 1
        running.process.kill()
        await running.ended()
        orphans = [line["worker"] for line in running.lines if line["event"] == "the supervisor is gone"]
        assert sorted(orphans) == [0, 1]
        assert list(directory.iterdir()) == []


async def test_what_is_wrong_with_the_settings_is_told_once_and_nothing_runs_on() -> None:
    async with workers() as running:
        assert await running.ended() == 2
        told = [line["text"] for line in running.lines if line["event"] == "text"]
        assert len(told) == 1
        assert "worker 0 cannot start: route.endpoints: is missing" in told[0]


async def test_a_port_that_another_process_has_is_refused_at_once() -> None:
    async with engine() as one, workers("--port", str(one.port), *named(one)) as running:
        assert await running.ended() == 2
        assert any("proxy.port" in line.get("text", "") for line in running.lines)
