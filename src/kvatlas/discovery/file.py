"""Endpoints from a file that is watched.

The file is read again at every interval and its content compared. That costs tens of microseconds a second, and sees whatever
way it changed: written in place, renamed over, a ConfigMap's symlinks swapped, on file systems that send no notifications too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from kvatlas.config import EngineSettings
from kvatlas.discovery.endpoints import FILE_BYTES_MAX, Pool, pool_from_file
from kvatlas.errors import ConfigError
from kvatlas.observe.logs import get_logger
from kvatlas.route.endpoint import Endpoint

log = get_logger("kvatlas.discovery")

SETTLE_S = 0.1
"""How long a change has to stand before it counts: a file that is being written is short for a moment."""


class FileDiscovery:
    """Tells what a file describes, as in llm-d's file-discovery (``path``, ``watchFile``).

    A file that cannot be read, or not be understood, leaves the endpoints as they were: that is logged once for each problem,
    and ``failed`` is called. ``subscribe`` gets the engines whose events the file names, before the endpoints are told.
    """

    def __init__(
        self,
        path: Path,
        *,
        watch: bool = True,
        interval_s: float = 1.0,
        subscribe: Callable[[Sequence[EngineSettings]], None] = lambda _engines: None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._watch = watch
        self._interval_s = interval_s
        self._subscribe = subscribe
        self._failed = failed
        self._seen: bytes | str = b""
        """What the last look found: a content, or what was wrong."""
        self._held: bytes | str = b""
        """What was acted on last."""

    async def run(self, changed: Callable[[Sequence[Endpoint]], None]) -> None:
        """Tell what the file describes, again when that changes. Raises ConfigError where it is bad at the start."""
        content = await asyncio.to_thread(_read, self._path)
        self._tell(pool_from_file(content, str(self._path)), changed)
        self._seen = self._held = content
        while self._watch:
            found = await self._look()
            if found == self._seen and found != self._held:
                self._held = found
                self._act_on(found, changed)
            settling = found != self._seen
            self._seen = found
            await asyncio.sleep(min(SETTLE_S, self._interval_s) if settling else self._interval_s)
        await asyncio.Event().wait()

    async def _look(self) -> bytes | str:
        try:
            return await asyncio.to_thread(_read, self._path)
        except ConfigError as error:
            return str(error)

    def _act_on(self, found: bytes | str, changed: Callable[[Sequence[Endpoint]], None]) -> None:
        problem = found if isinstance(found, str) else None
        try:
            pool = pool_from_file(found, str(self._path)) if isinstance(found, bytes) else None
        except ConfigError as error:
            problem = str(error)
        if problem is not None:
            self._failed()
            log.warning("the endpoints file is bad; endpoints stay as they were", path=str(self._path), problem=problem)
        elif pool is not None:
            log.info("the endpoints file was read again", path=str(self._path), endpoints=len(pool.endpoints))
            self._tell(pool, changed)

    def _tell(self, pool: Pool, changed: Callable[[Sequence[Endpoint]], None]) -> None:
        self._subscribe(pool.engines)
        changed(pool.endpoints)


def _read(path: Path) -> bytes:
    """Return a file's content, at most one byte more than is allowed. Raises ConfigError."""
    try:
        if not path.is_file():  # a directory, or a pipe that would hold the thread
            raise ConfigError(str(path), "is no file", "a readable endpoints file")
        with path.open("rb") as opened:
            return opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}", "a readable endpoints file") from None
