"""Sources that come and go while the write path runs: those of engines that discovery finds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence

import zmq.asyncio

from kvatlas.ingest.sources import EventSource, Origin, Sink
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics

log = get_logger("kvatlas.ingest")

SourceFactory = Callable[[zmq.asyncio.Context], EventSource]
OriginFactory = tuple[Origin, SourceFactory]


class Followed:
    """Runs the sources that are wanted now. Apart from ``want`` it belongs to the event loop's thread.

    A source that fails (its address is none) is logged and counted, and left until it is wanted anew; the others run on.
    """

    def __init__(self, sink: Sink, left: Callable[[Origin], None], metrics: Metrics) -> None:
        """``left``: told of the origin of a source that is not wanted any more."""
        self._sink = sink
        self._left = left
        self._metrics = metrics
        self._wanted: Mapping[Hashable, OriginFactory] = {}
        self._running: dict[Hashable, tuple[Origin, asyncio.Task[None]]] = {}

    def want(self, sources: Mapping[Hashable, OriginFactory]) -> None:
        """Say which sources there should be, by a key that tells them apart. Takes effect with :meth:`settle`."""
        self._wanted = dict(sources)

    def settle(self, context: zmq.asyncio.Context) -> None:
        """Start what is wanted and does not run, stop what is not."""
        for gone in self._running.keys() - self._wanted.keys():
            origin, task = self._running.pop(gone)
            task.cancel()
            self._left(origin)
        for key, (origin, make) in self._wanted.items():
            if key not in self._running:
                self._running[key] = origin, asyncio.create_task(self._run(make(context)))

    def tasks(self) -> Sequence[asyncio.Task[None]]:
        """Return the tasks of all that run."""
        return [task for _, task in self._running.values()]

    async def _run(self, source: EventSource) -> None:
        try:
            await source.run(self._sink)
        except Exception as error:
            causes = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
            self._metrics.connection(source.name, "failed")
            log.error("source failed; others run on", source=source.name, error=str(causes[0]))  # noqa: TRY400
