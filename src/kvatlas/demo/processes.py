"""Processes that end with the one that started them, whatever ends it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from kvatlas.errors import KvatlasError

START_S_MAX = 120.0
STOP_S_MAX = 10.0
LINES_KEPT = 12
_PR_SET_PDEATHSIG = 1


class DemoError(KvatlasError):
    """The demo cannot go on; says what it waited for, and the process's last lines where there are any."""


class Process:
    """``kvatlas`` with some arguments, as a process. Made by :func:`start`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._readers: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process.returncode is None

    def kill(self) -> None:
        """End it without a chance to say goodbye (SIGKILL)."""
        self._signal(signal.SIGKILL)

    async def stop(self) -> None:
        """End it as an operator would, with SIGTERM; kill it where it does not end."""
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), STOP_S_MAX)
        except TimeoutError:
            self.kill()
            await self._process.wait()
        await asyncio.gather(*self._readers)

    def follow(self, line: Callable[[str], None]) -> None:
        """Call ``line`` with each line that it writes, to standard output and to standard error."""
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            self._readers.append(asyncio.create_task(self._read(stream, line)))

    async def ended(self) -> int:
        """Return its exit status once it has ended and all that it wrote is read."""
        status = await self._process.wait()
        await asyncio.gather(*self._readers)
        return status

    def error(self, problem: str) -> DemoError:
        """Return an error with its last lines."""
        return DemoError("\n".join([f"{self.name}: {problem}", *(f"  {line}" for line in self._lines)]))

    async def _read(self, stream: asyncio.StreamReader, line: Callable[[str], None]) -> None:
        async for raw in stream:
            text = raw.decode("utf-8", "replace").rstrip()
            self._lines.append(text[:500])
            line(text)

    def _signal(self, number: signal.Signals) -> None:
        if self.runs:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


async def start(name: str, arguments: Sequence[str], until: Callable[[str], str | None]) -> tuple[Process, str]:
    """Run ``kvatlas`` with arguments. Return it with what ``until`` makes of the first line that it makes anything of.

    Settings in this process's environment are not handed on. DemoError where it ends before, or takes too long.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KVATLAS_")}
    parent = os.getpid()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvatlas", *arguments),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
        start_new_session=True,  # a terminal's Ctrl-C reaches the demo alone
        preexec_fn=lambda: _end_with(parent),
    )
    started = Process(name, process)
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def line(text: str) -> None:
        found = None if told.done() else until(text)
        if found is not None:
            told.set_result(found)

    started.follow(line)
    ended = asyncio.create_task(started.ended())
    try:
        either: set[asyncio.Future[Any]] = {told, ended}
        done, _ = await asyncio.wait(either, timeout=START_S_MAX, return_when=asyncio.FIRST_COMPLETED)
    except BaseException:
        started.kill()
        raise
    finally:
        ended.cancel()
    if told in done:
        return started, told.result()
    started.kill()
    raise started.error("it ended before it listened" if done else f"it did not listen within {START_S_MAX:g} s")


def _end_with(parent: int) -> None:
    """In a new process: be killed when the one that started it ends. Only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)
