"""One stream's worker: takes its frames in order, heals gaps, and says when the stream cannot be trusted.

    frame ─> queue (bounded) ─> judge ─┬─ next ──────> apply
                                       ├─ duplicate ─> drop
                                       ├─ gap ───────> replay, else stale
                                       └─ restart ───> drop entries, replay from 0

While a replay runs, live frames wait in the queue. What overflows it is not lost silently: the stream is stale until a replay
has brought it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor

import msgspec

from kvatlas.index import Index
from kvatlas.ingest.apply import Applier
from kvatlas.ingest.decode import Decoder
from kvatlas.ingest.sequence import SequenceTracker, Verdict
from kvatlas.ingest.sources import Replayer
from kvatlas.ingest.trust import StreamTrust
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.types import Frame, StaleReason, Stream

log = get_logger("kvatlas.ingest")

BATCH_FRAMES = 64
"""Frames handed to the index at once; bounds how long one stream holds it."""
REPLAY_ROUNDS_MAX = 1000
"""A replay that loses frames on the way is asked for again as long as it brings new ones, up to this often."""

_HEALED_BY_REPLAY = frozenset({StaleReason.GAP, StaleReason.QUEUE_FULL, StaleReason.DISCONNECTED})


class WorkerLimits(msgspec.Struct, frozen=True):
    queue_frames_max: int = 10_000
    drop_when_stale: bool = False
    """Drop a stale stream's entries; otherwise they stay, marked."""
    replay_trusted_frames: int = 500
    """A replay of more frames may have lost its last ones without a trace (an engine's ROUTER drops what its queue, 1,000 by
    default, does not hold): it is asked for again, until one brings fewer."""


class StreamWorker:
    """Owns one stream. Everything runs on one event loop but decoding and applying, which run in ``executor``."""

    def __init__(
        self,
        stream: Stream,
        *,
        model: str | None,
        decoder: Decoder,
        applier: Applier,
        index: Index,
        metrics: Metrics,
        executor: Executor,
        replayer: Replayer | None,
        timestamp_of: Callable[[bytes], float | None],
        limits: WorkerLimits,
        source: str,
    ) -> None:
        self.stream = stream
        self.model = model
        self.source = source
        self.gaps = 0
        self.replays = 0
        self.disconnected_since_s: float | None = None
        self._decoder = decoder
        self._applier = applier
        self._metrics = metrics
        self._executor = executor
        self._replayer = replayer
        self._limits = limits
        self._tracker = SequenceTracker(timestamp_of)
        self._trust = StreamTrust(stream, self._tracker, index, metrics, source, drop_when_stale=limits.drop_when_stale)
        self._queue: deque[Frame] = deque()
        self._reserving = threading.Lock()
        self._reserved = 0
        self._ready: list[Frame] = []
        """Judged, to be applied together."""
        self._checks: list[asyncio.Future[bool]] = []
        self._check_wanted = False
        self._taken_since_link_up = False
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()

    # -- from the sources (event loop) --------------------------------------------------------------------------------

    def offer(self, frame: Frame) -> bool:
        """Queue a frame; False if the queue is full, and the stream stale from now on."""
        self._rouse()
        if len(self._queue) < self._limits.queue_frames_max:
            self._queue.append(frame)
            return True
        self._metrics.frame(self.stream.pod, "dropped")
        if not self._trust.overflowed:
            log.warning("queue is full: stream is stale until resynced", **self._trust.names)
            self._trust.overflowed = True
            self._trust.show()
        return False

    def reserve(self) -> bool:
        """Take a place in the queue for a frame that :meth:`offer_reserved` brings later. From any thread."""
        with self._reserving:
            if len(self._queue) + self._reserved >= self._limits.queue_frames_max:
                return False
            self._reserved += 1
            return True

    def offer_reserved(self, frame: Frame) -> None:
        """Queue a frame whose place was reserved."""
        with self._reserving:
            self._reserved -= 1
        self._queue.append(frame)
        self._rouse()

    def link_up(self) -> None:
        """The engine is reachable (again): check what was missed."""
        if not self._trust.connected:
            self._trust.connected = True
            self._trust.verified = False
            self._taken_since_link_up = False
            self.disconnected_since_s = None
        self._check_wanted = True
        self._rouse()

    def link_down(self, now_s: float) -> None:
        """The engine is gone for now; nothing is known of it from here on."""
        self._trust.connected = False
        self.disconnected_since_s = now_s
        self._trust.show()

    def check(self) -> asyncio.Future[bool]:
        """Ask the engine for frames that did not arrive.

        The future is True when the index is as recent as the engine was; False when the engine could not be asked.
        """
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._checks.append(done)
        self._check_wanted = True
        self._rouse()
        return done

    def _rouse(self) -> None:
        self._settled.clear()
        self._wake.set()

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def stale(self) -> StaleReason | None:
        """Why the stream's entries may be wrong now; None if they are exact."""
        return self._trust.stale

    @property
    def restarts(self) -> int:
        return self._trust.restarts

    @property
    def queue_depth(self) -> int:
        """Frames received and not applied."""
        return len(self._queue) + self._reserved + len(self._ready)

    @property
    def next_seq(self) -> int | None:
        return self._tracker.next_seq

    @property
    def idle(self) -> bool:
        """True when there is nothing to do."""
        return self._settled.is_set()

    async def settled(self) -> None:
        """Wait until every frame received has been applied."""
        await self._settled.wait()

    @property
    def caught_up(self) -> bool:
        """False while a replay is bringing what the engine published before."""
        return not (self._trust.resyncing or self._trust.overflowed)

    @property
    def can_replay(self) -> bool:
        return self._replayer is not None

    # -- the worker's task --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue or self._check_wanted or self._trust.overflowed:
                if self._trust.overflowed:
                    await self._recover_from_overflow()
                elif self._check_wanted:
                    await self._answer_checks()
                else:
                    await self._take_queued()
            if not self._wake.is_set():
                self._settled.set()

    async def _take_queued(self) -> None:
        """Take what has arrived, and apply it."""
        while self._queue and not self._trust.overflowed:
            await self._take(self._queue.popleft())
        await self._flush()

    async def _take(self, frame: Frame) -> None:
        """Judge one live frame and do what it asks for."""
        if frame.seq is None:
            await self._make_ready(frame)
            return
        verdict = self._tracker.judge(frame.seq, frame.payload)
        if verdict is Verdict.RESTART:
            await self._flush()
            if not await self._resync():
                self._trust.engine_restarted()
                if self._taken_since_link_up:  # some of those may have been the new process's: they are dropped too
                    self._trust.spoil(self._history_lost, until_replayed=True)
            verdict = self._tracker.judge(frame.seq, frame.payload)
            if verdict is Verdict.RESTART:  # a replay has shown that the engine is the same: an old frame came late
                verdict = Verdict.DUPLICATE
        if verdict is Verdict.GAP:
            await self._flush()
            verdict = await self._bridge_gap(frame.seq, frame.payload)
        if verdict is Verdict.NEXT:
            await self._make_ready(frame)
        else:
            self._metrics.frame(self.stream.pod, "duplicate")

    async def _bridge_gap(self, seq: int, payload: bytes) -> Verdict:
        """Return what the frame is after a replay: a duplicate, or the next; without one, the stream is stale from here."""
        first_contact = self._tracker.next_seq is None
        if not first_contact:
            missed = seq - (self._tracker.next_seq or 0)
            self.gaps += 1
            self._metrics.gap(self.stream.pod, missed)
            log.warning("frames are missing", missed=missed, seq=seq, **self._trust.names)
        if await self._resync():
            verdict = self._tracker.judge(seq, payload)
            if verdict is not Verdict.GAP:
                return Verdict.NEXT if verdict is Verdict.NEXT else Verdict.DUPLICATE
        self._trust.spoil(self._history_lost if first_contact else StaleReason.GAP)
        self._tracker.reset(seq)
        return Verdict.NEXT

    @property
    def _history_lost(self) -> StaleReason:
        """Frames before those we have are missing: for good, unless an engine can be asked (later) for all of them."""
        return StaleReason.HISTORY_INCOMPLETE if self._replayer is None else StaleReason.GAP

    async def _recover_from_overflow(self) -> None:
        """Let go of the queue where a replay can bring it again; else go on with what is there, and stay stale."""
        self.gaps += 1
        self._metrics.gap(self.stream.pod, 0)
        if self._replayer is None:
            self._trust.overflowed = False
            self._trust.spoil(StaleReason.QUEUE_FULL)
            return
        self._queue.clear()
        self._trust.overflowed = False
        if not await self._resync():
            self._trust.spoil(StaleReason.QUEUE_FULL)

    async def _answer_checks(self) -> None:
        self._check_wanted = False
        waiting, self._checks = self._checks, []
        await self._take_queued()  # what has arrived need not be replayed
        answered = self._trust.connected and await self._resync()
        if self._trust.connected and not self._trust.verified:
            self._trust.spoil(StaleReason.DISCONNECTED)  # which process the next frames are of can't be told
        for done in waiting:
            if not done.done():
                done.set_result(answered)

    # -- replay -------------------------------------------------------------------------------------------------------

    async def _resync(self) -> bool:
        """Bring the stream up to what the engine has published. False where that can't be done or failed.

        Suspect entries go as soon as a replay from frame 0 begins to arrive.
        """
        if self._replayer is None:
            return False
        from_scratch = self._trust.flaw in _HEALED_BY_REPLAY
        taken = 0
        again = True
        if from_scratch or self._tracker.next_seq is None:
            self._show_resyncing()
        try:
            for _ in range(REPLAY_ROUNDS_MAX):
                if not again:
                    break
                frames, again = await self._replay_once(from_scratch=from_scratch)
                from_scratch = False
                taken += frames
        except (TimeoutError, OSError) as error:
            self._metrics.replay(self.stream.pod, "timeout", taken)
            log.warning("replay failed", problem=str(error) or "no answer in time", **self._trust.names)
            return False
        else:
            self._trust.verified = True
            if taken:
                self.replays += 1
                incomplete = self._trust.flaw is StaleReason.HISTORY_INCOMPLETE
                self._metrics.replay(self.stream.pod, "incomplete" if incomplete else "healed", taken)
            return True
        finally:
            await self._flush()
            self._trust.resyncing = False
            self._trust.show()

    async def _replay_once(self, *, from_scratch: bool) -> tuple[int, bool]:
        """Take one replay. Returns frames applied, and whether to ask again: it may have holes, or the engine had restarted.

        TimeoutError for an engine that does not answer, or whose replay brings nothing new but has a hole.
        """
        assert self._replayer is not None
        tracker = self._tracker
        known = 0 if from_scratch else tracker.next_seq or 0
        start = max(0, known - 1)  # the last frame known shows whether the engine is still the same
        taken = 0
        first = True
        async with contextlib.aclosing(self._replayer.replay(start)) as frames:
            async for frame in frames:
                assert frame.seq is not None
                if first:
                    first = False
                    if known and frame.seq == start and tracker.remembers(start, frame.payload) is False:
                        self._trust.engine_restarted()
                        return taken, True
                    if from_scratch or tracker.next_seq is None or frame.seq > start:
                        self._trust.begin(frame.seq)
                expected = tracker.next_seq or 0
                if frame.seq > expected:
                    if not taken:
                        raise TimeoutError(f"frame {expected} is missing in the replay")
                    return taken, True
                if frame.seq == expected:
                    self._metrics.frame(self.stream.pod, "replayed")
                    await self._make_ready(frame)
                    taken += 1
                    self._show_resyncing()
        if first and known:
            self._trust.engine_restarted()  # it has published less than we have seen
            return taken, True
        if first:
            self._trust.begin(0)  # it has published nothing
        return taken, taken >= self._limits.replay_trusted_frames

    def _show_resyncing(self) -> None:
        if not self._trust.resyncing:
            self._trust.resyncing = True
            self._trust.show()

    # -- apply --------------------------------------------------------------------------------------------------------

    async def _make_ready(self, frame: Frame) -> None:
        self._ready.append(frame)  # before its number is known: who sees that number and an empty queue sees it applied
        if frame.seq is not None:
            self._tracker.accept(frame.seq, frame.payload)
            self._taken_since_link_up = True
        if len(self._ready) >= BATCH_FRAMES:
            await self._flush()

    async def _flush(self) -> None:
        """Apply the frames that are ready."""
        if not self._ready:
            return
        applied = await asyncio.get_running_loop().run_in_executor(
            self._executor, self._applier.apply, self.stream, self._ready, self._decoder, self.model
        )
        for _ in self._ready:
            self._metrics.frame(self.stream.pod, "applied")
        self._ready = []
        self._trust.learn(applied)
