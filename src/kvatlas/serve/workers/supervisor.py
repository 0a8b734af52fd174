"""The supervisor: starts worker processes behind one port, starts those again that die, and stops them together."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import uvloop

from kvatlas.config import Config
from kvatlas.config.proxy import ProxySettings
from kvatlas.errors import WorkerError
from kvatlas.observe.logs import configure_logs, get_logger
from kvatlas.serve import service
from kvatlas.serve.listening import bind
from kvatlas.serve.stopping import Stopping, stopping_by
from kvatlas.serve.workers.plan import SETTLED_S, check, plan_of, restart_in_s, write_plan
from kvatlas.serve.workers.process import Started
from kvatlas.serve.workers.worker import Worker

KILLED_AFTER_S = 10.0
"""Beyond all graces a worker that does not end is killed."""

_MODULE = "kvatlas.serve.workers.process"
_log = get_logger(__name__)


def run(config: Config) -> None:
    """Serve in as many processes as route.workers says, until SIGTERM or SIGINT. Raises as ``serve`` does, and WorkerError."""
    if config.route.workers == 1 or not config.route.front_doors:
        service.run(config)
        return
    check(config)
    configure_logs(config.log)
    uvloop.run(supervise(config))


async def supervise(config: Config) -> None:
    """Run workers until SIGTERM or SIGINT; a second one cuts requests in progress. Raises WorkerError where one can't start."""
    if not config.zmq.engines:
        _log.info("no engine is connected to for its events", remedy="name engines in zmq.engines or route.endpointsFile")
    with (
        stopping_by(None) as stopping,
        _reserved(config.proxy) as port,
        tempfile.TemporaryDirectory(prefix="kvatlas-") as directory,  # where workers talk to each other: of this user alone
    ):
        await _Workers(config, port, directory, stopping).run()
    _log.info("workers stopped")


class _Workers:
    """All of them."""

    def __init__(self, config: Config, port: int, directory: str, stopping: Stopping) -> None:
        self._config = config
        self._port = port
        self._directory = directory
        self._stopping = stopping
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        """Those that run, by number."""

    async def run(self) -> None:
        count = self._config.route.workers
        began: list[Started] = []
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._stop())
            began.append(await self._begin(tasks, 0))  # alone: what is wrong with the settings is told once
            if began[0].addresses is not None:
                began += await asyncio.gather(*(self._begin(tasks, number) for number in range(1, count)))
            serving = [one.addresses for one in began if one.addresses is not None]
            if len(serving) == count:
                _log.info("workers serving", workers=count, proxy=serving[0].proxy, apis=[one.http for one in serving])
            else:
                self._stopping.asked.set()
        for number, one in enumerate(began):
            if one.problem is not None:
                raise WorkerError(number, one.problem)

    async def _begin(self, tasks: asyncio.TaskGroup, number: int) -> Started:
        """Start a worker, and keep it running. Return how its start went; nothing known: all stop meanwhile."""
        began: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        tasks.create_task(self._keep(number, began))
        return await began

    async def _keep(self, number: int, began: asyncio.Future[Started]) -> None:
        starts = failures = 0
        while not self._stopping.asked.is_set():
            starts += 1
            started_s = time.monotonic()
            process = await self._start(self._worker(number, starts))
            told = await _told(process)
            if told.addresses is not None:
                _log.info("worker started", worker=number, pid=process.pid, starts=starts)
                if not began.done():
                    began.set_result(told)
            code = await process.wait()
            del self._processes[number]
            if self._stopping.asked.is_set():
                break
            if not began.done():
                began.set_result(Started(problem=told.problem or f"it ended with status {code}"))
                return
            failures = 1 if time.monotonic() - started_s >= SETTLED_S else failures + 1
            wait_s = restart_in_s(failures)
            _log.warning("a worker died", worker=number, status=code, problem=told.problem, starts=starts, again_in_s=wait_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.asked.wait(), wait_s)
        if not began.done():
            began.set_result(Started())

    def _worker(self, number: int, starts: int) -> Worker:
        return Worker(number, self._config.route.workers, starts, self._config.api.port or None)

    async def _start(self, worker: Worker) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            _MODULE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone
        )
        self._processes[worker.number] = process
        assert process.stdin is not None
        plan = write_plan(plan_of(self._config, worker, self._port, self._directory))
        process.stdin.write(len(plan).to_bytes(4, "big") + plan)
        if self._stopping.asked.is_set():
            _signal(process, signal.SIGTERM)
        return process

    async def _stop(self) -> None:
        await self._stopping.asked.wait()
        _log.info("workers stopping", workers=len(self._processes))
        await self._end()

    async def _end(self) -> None:
        """Let all finish what is in progress; kill who does not end."""
        running = list(self._processes.values())
        for process in running:
            _signal(process, signal.SIGTERM)
        ended = asyncio.gather(*(process.wait() for process in running))
        cut = asyncio.create_task(self._stopping.at_once.wait())
        grace_s = self._config.proxy.shutdown_grace + self._config.api.shutdown_grace + KILLED_AFTER_S
        either: set[asyncio.Future[Any]] = {ended, cut}
        await asyncio.wait(either, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            for process in running:
                _signal(process, signal.SIGTERM)
            await asyncio.wait({ended}, timeout=KILLED_AFTER_S)
        cut.cancel()
        for process in running:
            _signal(process, signal.SIGKILL)
        await ended


async def _told(process: asyncio.subprocess.Process) -> Started:
    """Return how a worker's start went; nothing known of one that died before it could say."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    try:
        return msgspec.json.decode(line, type=Started)
    except msgspec.MsgspecError:
        return Started()


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


@contextlib.contextmanager
def _reserved(settings: ProxySettings) -> Iterator[int]:
    """Return the proxy's port, held for the workers by a socket that takes no connections. ConfigError where it is taken."""
    if not settings.reuse_port:  # else another process on the port would take a share of its connections, unnoticed
        bind("proxy", settings.host, settings.port).close()
    with bind("proxy", settings.host, settings.port, reuse_port=True) as held:
        yield held.getsockname()[1]
