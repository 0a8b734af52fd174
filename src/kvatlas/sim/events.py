"""KV events on their way from simulated engines to a real index: with lag and loss, judged by the real write path's rules.

An engine publishes what a step did to its cache as one frame: a vLLM payload (``sim.frame``), which the index or the write
path's decoder reads. A frame has the next number of its stream, and arrives some time later, in order, or not at all. What a
number means is decided by ``ingest.sequence``, what a stream is worth by ``ingest.trust``; a replay brings what was lost, and
all that was published meanwhile, as ``ingest.worker`` does it.
"""

from __future__ import annotations

import random as random_module
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

from kvatlas.index import Index
from kvatlas.index.protocol import PayloadIndex
from kvatlas.indexer import Indexer
from kvatlas.ingest.decode.vllm import VllmDecoder
from kvatlas.ingest.sequence import SequenceTracker, Verdict
from kvatlas.ingest.trust import StreamTrust
from kvatlas.observe.metrics import Metrics
from kvatlas.types import PodId, StaleReason, Stream

EXPIRE_EVERY_S = 60.0
PUBLISHED_MAX = 10_000
"""Frames that an engine keeps for replays. Source: vLLM, KVEventsConfig.buffer_steps."""


class EventPath(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to frames between an engine and the index."""

    lag_s: float = 0.0
    """From the beginning of an engine's step until the index knows what it did."""
    jitter_s: float = 0.0
    """On top of it, evenly from 0 up to this. Frames do not overtake each other."""
    loss: float = 0.0
    """Share of frames that are lost, 0 to 1."""
    replay_after_s: float | None = 0.1
    """How long a replay takes from the moment a gap is seen. None: engines cannot be asked, and a gap is for good."""


class _Frame(msgspec.Struct, frozen=True, gc=False):
    seq: int
    payload: bytes
    published_s: float
    arrives_s: float | None
    """None: it is lost."""


class EventStream:
    """One engine's frames: those that are under way, and what the index has been told."""

    def __init__(self, stream: Stream, model: str, index: Index, metrics: Metrics, path: EventPath) -> None:
        self.lost = 0
        self.gaps = 0
        self._stream = stream
        self._model = model
        self._index = index
        self._reader = index if isinstance(index, PayloadIndex) else None
        self._decoder = VllmDecoder()
        self._path = path
        self._tracker = SequenceTracker()
        self._trust = StreamTrust(stream, self._tracker, index, metrics, "simulation", drop_when_stale=False)
        self.under_way: deque[_Frame] = deque()
        """Published, and not told to the index."""
        self._next_seq = 0
        self._arrives_s = 0.0
        self._healed_s: float | None = None
        """When the replay that is asked for will have come."""

    @property
    def stale(self) -> StaleReason | None:
        return self._trust.stale

    def publish(self, at_s: float, payload: bytes, random: random_module.Random) -> None:
        """Take a frame that the engine publishes now, with the step that begins."""
        path = self._path
        arrives_s: float | None
        if path.loss and random.random() < path.loss:
            arrives_s = None
            self.lost += 1
        elif path.jitter_s:
            arrives_s = self._arrives_s = max(self._arrives_s, at_s + path.lag_s + random.random() * path.jitter_s)
        else:
            arrives_s = at_s + path.lag_s
        under_way, seq = self.under_way, self._next_seq
        under_way.append(_Frame(seq, payload, at_s, arrives_s))
        self._next_seq = seq + 1
        if len(under_way) > PUBLISHED_MAX:
            self.deliver(at_s)  # for want of a decision nobody looked for long
            if len(under_way) > PUBLISHED_MAX:
                under_way.popleft()

    def deliver(self, now_s: float) -> None:
        """Tell the index what has arrived by now: nobody asks it between two decisions, so before each is soon enough."""
        under_way = self.under_way
        while under_way:
            if self._healed_s is not None:
                if now_s < self._healed_s:
                    return
                self._replay(self._healed_s)
                continue
            frame = self._first_heard(now_s)
            if frame is None:
                return
            if self._tracker.judge(frame.seq, frame.payload) is Verdict.GAP and self._ask(now_s=frame.arrives_s or 0.0):
                continue
            while under_way[0] is not frame:
                under_way.popleft()  # lost for good
            self._accept(now_s)

    def _accept(self, now_s: float) -> None:
        """Tell the index of the next frames, as far as they have arrived without a gap."""
        under_way, payloads = self.under_way, []
        while under_way and (arrives_s := under_way[0].arrives_s) is not None and arrives_s <= now_s:
            frame = under_way.popleft()
            payloads.append(frame.payload)
        self._tracker.accept(frame.seq, frame.payload)
        self._apply(payloads)

    def _apply(self, payloads: Sequence[bytes]) -> None:
        """Let the index read payloads by itself, if it can; else the write path's decoder reads them."""
        if self._reader is not None:
            taken = self._reader.apply_payloads(self._stream, payloads, self._decoder.name, self._model).taken
            payloads = payloads[taken:]
        for payload in payloads:
            for batch in self._decoder.decode(payload).batches:
                self._index.apply(self._stream, msgspec.structs.replace(batch, model=self._model))

    def _first_heard(self, now_s: float) -> _Frame | None:
        """Return the first frame that is not lost, if it has arrived."""
        for frame in self.under_way:
            if frame.arrives_s is not None:
                return frame if frame.arrives_s <= now_s else None
        return None

    def _ask(self, now_s: float) -> bool:
        """Frames are missing: ask for a replay. False where there is none: the stream is stale from here."""
        self.gaps += 1
        if self._path.replay_after_s is None:
            if self._trust.flaw is None:
                self._trust.spoil(StaleReason.GAP)
            return False
        self._healed_s = now_s + self._path.replay_after_s
        self._trust.resyncing = True
        self._trust.show()
        return True

    def _replay(self, healed_s: float) -> None:
        """Bring all that was published by the time of the replay's end, lost or not."""
        under_way, payloads = self.under_way, []
        self._healed_s = None
        if under_way[0].seq > (self._tracker.next_seq or 0):
            self._trust.begin(under_way[0].seq)  # the engine does not keep older ones
        while under_way and under_way[0].published_s <= healed_s:
            frame = under_way.popleft()
            self._tracker.accept(frame.seq, frame.payload)
            payloads.append(frame.payload)
        self._apply(payloads)
        self._trust.resyncing = False
        self._trust.show()


class EventStreams:
    """The streams of all engines of one run, engines by number."""

    def __init__(self, model: str, indexer: Indexer, path: EventPath, random: random_module.Random) -> None:
        self._model = model
        self._indexer = indexer
        self._path = path
        self._random = random
        self._streams: dict[int, EventStream] = {}
        self._pods: dict[int, Stream] = {}
        self._gone: list[EventStream] = []
        self._expire_s = EXPIRE_EVERY_S
        self._doubtful = 0

    def joins(self, engine: int, name: str) -> None:
        """An engine publishes from now on. ``name``: what the index knows it by."""
        self._pods[engine] = stream = Stream(PodId(name))
        index, metrics = self._indexer.index, self._indexer.metrics
        self._streams[engine] = EventStream(stream, self._model, index, metrics, self._path)

    def leaves(self, engine: int) -> None:
        """It is gone, and what the index knows of it with it."""
        self._gone.append(self._streams.pop(engine))
        self._indexer.index.forget(self._pods.pop(engine))

    def publish(self, engine: int, at_s: float, payload: bytes) -> None:
        """An engine publishes a frame."""
        self._streams[engine].publish(at_s, payload, self._random)

    def deliver(self, now_s: float) -> None:
        """Tell the index what has arrived: somebody is about to ask it."""
        stale = False
        for stream in self._streams.values():
            if stream.under_way:
                stream.deliver(now_s)
            stale = stale or (stream.gaps > 0 and stream.stale is not None)
        self._doubtful += stale

    def expire(self, now_s: float) -> None:
        """Let the index drop what is too old, once in a while."""
        if now_s >= self._expire_s:
            self._indexer.index.expire()
            self._expire_s = now_s + EXPIRE_EVERY_S

    def counts(self) -> Mapping[str, int]:
        """Return what was degraded, as words and how often."""
        streams = [*self._gone, *self._streams.values()]
        return {
            "frames of events were lost": sum(stream.lost for stream in streams),
            "gaps were found in streams of events": sum(stream.gaps for stream in streams),
            "decisions were made while a stream was stale": self._doubtful,
            "streams were stale at the end": sum(stream.stale is not None for stream in self._streams.values()),
        }
