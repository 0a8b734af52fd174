"""All streams of a deployment: runs the sources, gives each stream its worker, and lets go of pods that went.

One thread runs one event loop for all sources and workers; decoding and applying happen in a small pool, so that streams
proceed beside each other while each keeps its order.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Coroutine, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import zmq.asyncio

from kvatlas.errors import RequestError, SourceError
from kvatlas.index import Index
from kvatlas.ingest.apply import Applier
from kvatlas.ingest.decode import Decoder, load_decoder, peek_header
from kvatlas.ingest.followed import Followed, OriginFactory, SourceFactory
from kvatlas.ingest.sources import EventSource, Origin
from kvatlas.ingest.sources.zmq import SocketLimits, ZmqReplayer
from kvatlas.ingest.topic import parse_topic
from kvatlas.ingest.worker import StreamWorker, WorkerLimits
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.types import DpRank, Frame, Stream

log = get_logger("kvatlas.ingest")

T = TypeVar("T")

POD_NAME_CHARACTERS_MAX = 512
"""Names go into metrics, logs and answers."""


class IngestLimits(msgspec.Struct, frozen=True):
    """Bounds and times of the write path."""

    worker: WorkerLimits = WorkerLimits()
    socket: SocketLimits = SocketLimits()
    streams_max: int = 4096
    """Streams beyond it are refused and counted."""
    gone_after_s: float = 60.0
    """A pod that cannot be reached for longer is dropped."""
    replay_timeout_s: float = 5.0
    audit_interval_s: float = 5.0
    """How often a quiet stream is compared with its engine, which finds frames lost at the end; 0 never."""
    apply_threads: int = 2


class _StreamTask(msgspec.Struct, eq=False):
    worker: StreamWorker
    task: asyncio.Task[None]
    origin: Origin
    audited_s: float


class Ingestor:
    """Thread-safe from outside; inside, all state belongs to the loop's thread."""

    def __init__(
        self,
        index: Index,
        metrics: Metrics,
        applier: Applier,
        sources: Sequence[SourceFactory],
        limits: IngestLimits | None = None,
    ) -> None:
        self._index = index
        self._metrics = metrics
        self._applier = applier
        self._source_factories = sources
        self._limits = limits or IngestLimits()
        self._streams: dict[Stream, _StreamTask] = {}
        self._by_origin: dict[Origin, set[Stream]] = {}
        self._down: set[Origin] = set()
        self._silent: dict[Origin, float] = {}
        """Connected engines that can be asked and have not been heard of; with the time of the last question."""
        self._decoders: dict[str, Decoder] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._stop: asyncio.Event | None = None
        self._wake_watch = asyncio.Event()
        self._questions: set[asyncio.Task[bool]] = set()
        self._failure: SourceError | None = None
        self._executor = ThreadPoolExecutor(self._limits.apply_threads, thread_name_prefix="kvatlas-apply")
        self._context: zmq.asyncio.Context | None = None
        self.sources: list[EventSource] = []
        self._followed = Followed(self, self._left, metrics)

    # -- life -----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the sources. Returns when they are bound and connecting; SourceError if one cannot start."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="kvatlas-ingest", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop the sources and workers; frames not applied yet are left."""
        if self._loop is not None and self._stop is not None and self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout_s)
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._context = zmq.asyncio.Context()
        self.sources = [make(self._context) for make in self._source_factories]
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(self._run_source(source)) for source in self.sources]
        tasks.append(asyncio.create_task(self._watch()))
        self._followed.settle(self._context)
        await asyncio.sleep(0)  # let every source bind or connect
        await asyncio.sleep(0)
        self._started.set()
        await self._stop.wait()
        tasks.extend(entry.task for entry in self._streams.values())
        tasks.extend(self._questions)
        tasks.extend(self._followed.tasks())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _run_source(self, source: EventSource) -> None:
        try:
            await source.run(self)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            causes = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
            problem = next((cause for cause in causes if isinstance(cause, SourceError)), None)
            self._failure = problem or SourceError(source.name, repr(causes[0]), "see the log for where it failed")
            self._metrics.connection(source.name, "failed")
            log.error("source failed", source=source.name, error=str(self._failure), exc_info=problem is None)  # noqa: TRY400

    @property
    def running(self) -> bool:
        """True while sources run and none has failed."""
        return self._failure is None and self._thread is not None and self._thread.is_alive()

    @property
    def failure(self) -> str | None:
        """What made a source fail."""
        return None if self._failure is None else str(self._failure)

    # -- sink (loop thread) ---------------------------------------------------------------------------------------------

    def frame(self, origin: Origin, frame: Frame) -> None:
        entry = self._entry(origin, frame)
        if entry is not None:
            if entry.origin is not origin and entry.worker.disconnected_since_s is not None:
                self._move(entry, origin)
            entry.worker.offer(frame)

    def connected(self, origin: Origin) -> None:
        self._metrics.connection(origin.source, "connected")
        log.info("source connected", source=origin.source)
        self._down.discard(origin)
        streams = self._by_origin.get(origin, set())
        for stream in streams:
            self._streams[stream].worker.link_up()
        if not streams and origin.replay_endpoint and "{" not in origin.replay_endpoint:
            self._silent[origin] = -math.inf
            self._wake_watch.set()

    def disconnected(self, origin: Origin) -> None:
        if origin in self._down:
            return
        self._down.add(origin)
        self._silent.pop(origin, None)
        self._metrics.connection(origin.source, "disconnected")
        log.warning("source disconnected", source=origin.source)
        for stream in self._by_origin.get(origin, ()):
            self._streams[stream].worker.link_down(time.monotonic())

    def _left(self, origin: Origin) -> None:
        self.disconnected(origin)
        self._down.discard(origin)

    def malformed(self, origin: Origin, detail: str) -> None:
        self._metrics.decode_fault(origin.pod or origin.source, "not_a_frame")
        log.warning("message is no event frame", source=origin.source, detail=detail)

    async def _introduce(self, origin: Origin) -> bool:
        """Ask a newly connected engine for its first kept frame: it tells which pod this is, and the worker does the rest.

        Returns whether the engine answered; one that has published nothing does so with no frame.
        """
        assert origin.replay_endpoint is not None
        try:
            async with contextlib.aclosing(self._replayer(origin.replay_endpoint).replay(0)) as frames:
                async for frame in frames:
                    entry = self._entry(origin, frame)
                    if entry is not None:
                        entry.worker.link_up()
                    break
        except (TimeoutError, OSError):
            log.warning("no answer from the replay endpoint", source=origin.source, endpoint=origin.replay_endpoint)
            return False
        return True

    # -- streams --------------------------------------------------------------------------------------------------------

    def _stream_of(self, origin: Origin, frame: Frame) -> Stream | None:
        pod = origin.pod or parse_topic(frame.topic)[0] or origin.fallback_pod
        if pod is None or len(pod) > POD_NAME_CHARACTERS_MAX:
            return None
        rank = peek_header(frame.payload).dp_rank
        return Stream(pod, rank if rank is not None else origin.dp_rank or DpRank(0))

    def _entry(self, origin: Origin, frame: Frame) -> _StreamTask | None:
        stream = self._stream_of(origin, frame)
        if stream is None:
            self.malformed(origin, f"topic {frame.topic[:80]!r} names no pod (or one too long): set pod in zmq.engines")
            return None
        entry = self._streams.get(stream)
        if entry is None:
            if len(self._streams) >= self._limits.streams_max:
                self._metrics.frame("other", "refused")
                log.error("too many streams: frame refused", pod=stream.pod, streams_max=self._limits.streams_max)
                return None
            entry = self._open(stream, origin)
        return entry

    def _open(self, stream: Stream, origin: Origin) -> _StreamTask:
        endpoint = origin.replay_endpoint_of(stream)
        worker = StreamWorker(
            stream,
            decoder=self._decoder(origin.decoder),
            applier=self._applier,
            index=self._index,
            metrics=self._metrics,
            executor=self._executor,
            replayer=self._replayer(endpoint) if endpoint else None,
            model_of=lambda frame: origin.model or parse_topic(frame.topic)[1],
            limits=self._limits.worker,
            source=origin.source,
        )
        task = asyncio.create_task(self._run_worker(worker), name=f"stream {stream}")
        entry = _StreamTask(worker, task, origin, time.monotonic())
        self._streams[stream] = entry
        self._by_origin.setdefault(origin, set()).add(stream)
        self._silent.pop(origin, None)
        self._index.mark(stream, worker.stale)
        log.info("stream found", pod=stream.pod, dp_rank=stream.dp_rank, source=origin.source)
        return entry

    def _move(self, entry: _StreamTask, origin: Origin) -> None:
        """A stream that was cut off comes from elsewhere now."""
        self._leave_origin(entry)
        entry.origin = origin
        self._by_origin.setdefault(origin, set()).add(entry.worker.stream)
        entry.worker.link_up()

    def _leave_origin(self, entry: _StreamTask) -> None:
        siblings = self._by_origin[entry.origin]
        siblings.discard(entry.worker.stream)
        if not siblings:
            del self._by_origin[entry.origin]

    async def _run_worker(self, worker: StreamWorker) -> None:
        try:
            await worker.run()
        except Exception:
            # Our own mistake: what the stream holds can't be trusted. Drop it; its next frame starts it anew.
            log.exception("stream worker failed: its entries are dropped", pod=worker.stream.pod)
            self._metrics.decode_fault(worker.stream.pod, "internal")
            self._close(worker.stream)

    def _close(self, stream: Stream) -> None:
        entry = self._streams.pop(stream)
        self._leave_origin(entry)
        self._index.forget(stream)
        if not any(other.pod == stream.pod for other in self._streams):
            self._metrics.forget_pod(stream.pod)

    def _decoder(self, name: str) -> Decoder:
        if name not in self._decoders:
            self._decoders[name] = load_decoder(name)
        return self._decoders[name]

    def _replayer(self, endpoint: str) -> ZmqReplayer:
        assert self._context is not None
        return ZmqReplayer(self._context, endpoint, self._limits.replay_timeout_s, self._limits.socket)

    # -- watch ----------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Ask silent engines who they are, audit quiet streams, drop pods that are gone, expire entries."""
        interval_s = min(1.0, self._limits.gone_after_s / 4, self._limits.audit_interval_s / 2 or 1.0)
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake_watch.wait(), interval_s)
            self._wake_watch.clear()
            now_s = time.monotonic()
            self._ask_silent_engines(now_s)
            for stream, entry in list(self._streams.items()):
                since_s = entry.worker.disconnected_since_s
                if since_s is not None and now_s - since_s > self._limits.gone_after_s:
                    log.warning("pod is gone: dropped", pod=stream.pod, dp_rank=stream.dp_rank)
                    entry.task.cancel()
                    self._close(stream)
                elif self._audit_due(entry, now_s):
                    entry.audited_s = now_s
                    entry.worker.check()
            self._index.expire()

    def _ask_silent_engines(self, now_s: float) -> None:
        interval_s = self._limits.audit_interval_s or math.inf
        for origin, asked_s in list(self._silent.items()):
            if now_s - asked_s >= interval_s:
                self._silent[origin] = now_s
                task = asyncio.create_task(self._introduce(origin))
                self._questions.add(task)
                task.add_done_callback(self._questions.discard)

    def _audit_due(self, entry: _StreamTask, now_s: float) -> bool:
        interval_s = self._limits.audit_interval_s
        return interval_s > 0 and entry.worker.can_be_audited and now_s - entry.audited_s >= interval_s

    # -- from other threads ---------------------------------------------------------------------------------------------

    def publish(self, origin: Origin, frame: Frame) -> None:
        """Take a frame from this process. RequestError when the stream's queue is full or the ingest is not running.

        Costs a round trip to the loop for a stream's first frame only.
        """
        stream = self._stream_of(origin, frame)
        if stream is None:
            raise RequestError("pod", "neither topic nor request names the pod of this frame", "name it")
        loop = self._running_loop()
        entry = self._streams.get(stream)
        if entry is None:
            entry = self._call(self._opened(origin, frame)).result(timeout=10)
        if entry.origin.decoder != origin.decoder:
            raise RequestError("decoder", f"{stream} is read as {entry.origin.decoder!r}", "send all its frames in one format")
        if not entry.worker.reserve():
            raise RequestError("frame", "its stream's queue is full", "wait and send it again")
        loop.call_soon_threadsafe(entry.worker.offer_reserved, frame)

    async def _opened(self, origin: Origin, frame: Frame) -> _StreamTask:
        entry = self._entry(origin, frame)
        if entry is None:
            raise RequestError("pod", f"{self._limits.streams_max} streams are followed already", "raise ingest.streamsMax")
        return entry

    def follow(self, sources: Mapping[Hashable, OriginFactory]) -> None:
        """Run these sources beside the configured ones, and of those given before only these. Before start(): from then on.

        What came from a source that is left stays for as long as that of an engine that cannot be reached.
        """
        self._followed.want(sources)
        if self._loop is not None and self._context is not None:
            with contextlib.suppress(RuntimeError):  # the loop ended
                self._loop.call_soon_threadsafe(self._followed.settle, self._context)

    def sync(self, timeout_s: float = 10.0) -> bool:
        """Ask every engine for what it has published by now and apply it. False if one could not be asked. TimeoutError."""
        return self._call(self._sync()).result(timeout=timeout_s)

    async def _sync(self) -> bool:
        heard = await asyncio.gather(*(self._introduce(origin) for origin in list(self._silent)))
        return all(heard) and all(await asyncio.gather(*(entry.worker.check() for entry in self._streams.values())))

    def drain(self, timeout_s: float = 10.0) -> None:
        """Wait until every frame received so far is applied. TimeoutError if that takes longer."""
        self._call(self._drain()).result(timeout=timeout_s)

    async def _drain(self) -> None:
        for entry in list(self._streams.values()):
            await entry.worker.settled()

    def workers(self) -> list[StreamWorker]:
        """Return the workers of all streams, for reading their figures."""
        return [entry.worker for entry in list(self._streams.values())]

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            raise RequestError("indexer", "event ingest is not running", "call start() first")
        return self._loop

    def _call(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._running_loop())
        except RequestError:
            work.close()
            raise
