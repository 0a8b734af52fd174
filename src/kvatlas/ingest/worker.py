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
from kvatlas.ingest.replay_port import ReplayPort
from kvatlas.ingest.sequence import SequenceTracker, Verdict
from kvatlas.ingest.sources import Replayer
from kvatlas.ingest.trust import StreamTrust
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.types import Frame, StaleReason, Stream, Tier

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
    replay_backoff_s: float = 5.0
    """An engine that did not answer is left alone for this long, longer with each failure."""


class StreamWorker:
    """Owns one stream. Everything runs on one event loop but decoding and applying, which run in ``executor``."""

    def __init__(
        self,
        stream: Stream,
        *,
        decoder: Decoder,
        applier: Applier,
        index: Index,
        metrics: Metrics,
        executor: Executor,
        replayer: Replayer | None,
        model_of: Callable[[Frame], str | None],
        limits: WorkerLimits,
        source: str,
    ) -> None:
        self.stream = stream
        self.model: str | None = None
        """As the last frame named it."""
        self.source = source
        self.gaps = 0
        self.replays = 0
        self.disconnected_since_s: float | None = None
        self._decoder = decoder
        self._applier = applier
        self._metrics = metrics
        self._executor = executor
        self._limits = limits
        self._model_of = model_of
        self._tracker = SequenceTracker()
        self._trust = StreamTrust(stream, self._tracker, index, metrics, source, drop_when_stale=limits.drop_when_stale)
        self._replay: ReplayPort | None = None
        if replayer is not None:
            clock = asyncio.get_running_loop().time
            self._replay = ReplayPort(replayer, metrics, stream.pod, self._trust.names, limits.replay_backoff_s, clock)
        self._queue: deque[Frame] = deque()
        self._reserving = threading.Lock()
        self._reserved = 0
        self._ready: list[Frame] = []
        """Judged, to be applied together."""
        self._checks: list[asyncio.Future[bool]] = []
        self._check_wanted = False
        self._question: asyncio.Task[None] | None = None
        self._queued_before_replay = 0
        """How many frames at the head of the queue had arrived before the last replay ended."""
        self._taken_in_doubt = False
        """Frames were taken after a reconnect that nobody could check: they may have been another process's."""
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
        if self._replay is not None:
            self._replay.forgive()
        heard_of = self._tracker.next_seq is not None or bool(self._queue)
        if self._trust.connected and heard_of:
            self.check()
            return
        if self._trust.connected:
            self._show_resyncing()  # nothing is known of it yet
            self._check_wanted = True
            self._rouse()
            return
        self._trust.connected = True
        self._trust.verified = False
        self._taken_in_doubt = False
        self.disconnected_since_s = None
        self._check_wanted = True  # before any frame is taken: which process it is of has to be known
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
        if self._replay is None or not self._trust.connected or not self._trust.verified:
            self._check_wanted = True
            self._rouse()
        elif self._question is None:
            self._question = asyncio.create_task(self._ask(self._replay))
        return done

    async def _ask(self, replay: ReplayPort) -> None:
        """Ask whether there is anything to replay, beside the frames that are being taken; only then they have to wait."""
        asked, self._checks = self._checks, []  # who comes later wants a later answer
        try:
            if not replay.may_be_asked():
                _resolve(asked, False)
            elif await self._engine_has_more(replay) or self._trust.flaw in _HEALED_BY_REPLAY:
                self._checks = asked + self._checks
                self._check_wanted = True
                self._rouse()
            else:
                await self.settled()
                _resolve(asked, True)
        except (TimeoutError, OSError) as error:
            replay.failed(error, 0)
            _resolve(asked, False)
        finally:
            self._question = None
        if self._checks and not self._check_wanted:
            self._question = asyncio.create_task(self._ask(replay))

    async def _engine_has_more(self, replay: ReplayPort) -> bool:
        start = self._tracker.replay_from()
        heard = False
        async with contextlib.aclosing(replay.replay(start)) as frames:
            async for frame in frames:
                heard = True
                assert frame.seq is not None
                if self._tracker.remembers(frame.seq, frame.payload) is not True:
                    return True
        replay.answered()
        return not heard and bool(self._tracker.next_seq)

    def _rouse(self) -> None:
        self._settled.clear()
        self._wake.set()

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Where the stream's blocks were stored to, since it began anew."""
        return self._trust.tiers

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
    def can_be_audited(self) -> bool:
        """True when a check would find a quiet stream, and none is under way."""
        return self.can_replay and self._question is None and self.idle

    @property
    def can_replay(self) -> bool:
        return self._replay is not None

    @property
    def replay_answers(self) -> bool | None:
        """Whether the engine answered the last question for frames; None if it was never asked."""
        return self._replay.answers if self._replay is not None else None

    @property
    def replay_problem(self) -> str | None:
        """Why it did not; None where it did."""
        return self._replay.problem if self._replay is not None else None

    # -- the worker's task --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled."""
        try:
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
        finally:
            if self._question is not None:
                self._question.cancel()

    async def _take_queued(self) -> None:
        """Take what has arrived, and apply it."""
        while self._queue and not self._trust.overflowed:
            await self._take(self._queue.popleft())
        await self._flush()

    async def _take(self, frame: Frame) -> None:
        """Judge one live frame and do what it asks for."""
        arrived_before_replay = self._queued_before_replay > 0
        self._queued_before_replay -= arrived_before_replay
        if frame.seq is None:
            await self._make_ready(frame)
            return
        await self._heed_model(frame)
        verdict = self._tracker.judge(frame.seq, frame.payload)
        if verdict is Verdict.OLD and (arrived_before_replay or self._fills_known_gap(frame.seq)):
            verdict = Verdict.DUPLICATE
        if verdict in (Verdict.RESTART, Verdict.OLD):
            await self._flush()
            if not await self._resync(missed=True):
                self._restart_unseen()
            verdict = self._tracker.judge(frame.seq, frame.payload)
            if verdict in (Verdict.RESTART, Verdict.OLD):  # a replay has shown that the engine is the same: it came late
                verdict = Verdict.DUPLICATE
        if verdict is Verdict.GAP:
            await self._flush()
            verdict = await self._bridge_gap(frame.seq, frame.payload)
        if verdict is Verdict.NEXT:
            await self._make_ready(frame)
        else:
            self._metrics.frame(self.stream.pod, "duplicate")

    def _fills_known_gap(self, seq: int) -> bool:
        """A frame that is late in a stream that is stale for want of it helps no more; a restarted engine begins with 0."""
        return self._replay is None and self._trust.flaw is not None and seq > 0

    async def _heed_model(self, frame: Frame) -> None:
        """A pod that serves another model than before is another process."""
        model = self._model_of(frame)
        if model is not None and self.model is not None and model != self.model:
            await self._flush()
            self._restart_unseen()

    def _restart_unseen(self) -> None:
        """The engine must have restarted, and no replay can tell since when."""
        in_doubt, self._taken_in_doubt = self._taken_in_doubt, False
        self._trust.engine_restarted()
        if in_doubt:  # some of the frames taken may have been the new process's: they are dropped too
            self._trust.spoil(self._history_lost, until_replayed=True)

    async def _bridge_gap(self, seq: int, payload: bytes) -> Verdict:
        """Return what the frame is after a replay: a duplicate, or the next; without one, the stream is stale from here."""
        first_contact = self._tracker.next_seq is None
        if not first_contact:
            missed = seq - (self._tracker.next_seq or 0)
            self.gaps += 1
            self._metrics.gap(self.stream.pod, missed)
            log.warning("frames are missing", missed=missed, seq=seq, **self._trust.names)
        if await self._resync(missed=True):
            verdict = self._tracker.judge(seq, payload)
            if verdict is not Verdict.GAP:
                return Verdict.NEXT if verdict is Verdict.NEXT else Verdict.DUPLICATE
        self._trust.spoil(self._history_lost if first_contact else StaleReason.GAP)
        return Verdict.NEXT  # as far as it can be told

    @property
    def _history_lost(self) -> StaleReason:
        """Frames before those we have are missing: for good, unless an engine can be asked (later) for all of them."""
        return StaleReason.HISTORY_INCOMPLETE if self._replay is None else StaleReason.GAP

    async def _recover_from_overflow(self) -> None:
        """Bring by replay what the queue did not take; where that fails, go on with what it did take, and stay stale."""
        self.gaps += 1
        self._metrics.gap(self.stream.pod, 0)
        self._trust.overflowed = False
        if not await self._resync(missed=True):
            self._trust.spoil(StaleReason.QUEUE_FULL)
            await self._take_queued()

    async def _answer_checks(self) -> None:
        self._check_wanted = False
        asked, self._checks = self._checks, []
        if self._trust.verified:
            await self._take_queued()  # what has arrived need not be replayed
        answered = self._trust.connected and await self._resync()
        if self._trust.connected and not self._trust.verified:
            self._trust.spoil(StaleReason.DISCONNECTED)  # which process the next frames are of can't be told
        _resolve(asked, answered)

    # -- replay -------------------------------------------------------------------------------------------------------

    async def _resync(self, *, missed: bool = False) -> bool:
        """Bring the stream up to what the engine has published. False where that can't be done or failed.

        ``missed``: frames are known to be missing, so the stream is not exact until this has ended. Suspect entries go as
        soon as a replay from frame 0 begins to arrive.
        """
        replay = self._replay
        if replay is None or not replay.may_be_asked():
            return False
        from_scratch = self._trust.flaw in _HEALED_BY_REPLAY
        before = self._trust.flaw, self._trust.restarts
        taken = 0
        again = True
        if missed or from_scratch or self._tracker.next_seq is None:
            self._show_resyncing()
        try:
            for _ in range(REPLAY_ROUNDS_MAX):
                if not again:
                    break
                frames, again = await self._replay_once(replay, from_scratch=from_scratch)
                from_scratch = False
                taken += frames
        except (TimeoutError, OSError) as error:
            replay.failed(error, taken)
            if (self._trust.flaw, self._trust.restarts) != before:  # it has begun anew, and the end is missing
                await self._flush()
                self._trust.spoil(StaleReason.GAP)
            return False
        else:
            replay.answered()
            self._trust.verified = True
            self._taken_in_doubt = False
            self._queued_before_replay = len(self._queue)
            if taken:
                self.replays += 1
                incomplete = self._trust.flaw is StaleReason.HISTORY_INCOMPLETE
                self._metrics.replay(self.stream.pod, "incomplete" if incomplete else "healed", taken)
            return True
        finally:
            await self._flush()
            self._trust.resyncing = False
            self._trust.show()

    async def _replay_once(self, replay: ReplayPort, *, from_scratch: bool) -> tuple[int, bool]:
        """Take one replay. Returns frames applied, and whether to ask again: it may have holes, or the engine had restarted.

        TimeoutError for an engine that does not answer, or whose replay brings nothing new but has a hole.
        """
        tracker = self._tracker
        known = 0 if from_scratch else tracker.next_seq or 0
        start = 0 if from_scratch else tracker.replay_from()
        taken = 0
        first = True
        async with contextlib.aclosing(replay.replay(start)) as frames:
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
        model = self._model_of(frame)
        if model is not None and model != self.model:
            await self._flush()
            self.model = model
        self._ready.append(frame)  # before its number is known: who sees that number and an empty queue sees it applied
        if frame.seq is not None:
            self._tracker.accept(frame.seq, frame.payload)
            self._taken_in_doubt |= self._trust.flaw is StaleReason.DISCONNECTED
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


def _resolve(checks: list[asyncio.Future[bool]], answered: bool) -> None:
    for done in checks:
        if not done.done():
            done.set_result(answered)
