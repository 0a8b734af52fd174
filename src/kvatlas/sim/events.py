"""KV events on their way from simulated engines to a real index: with lag and loss, judged by the real write path's rules.

An engine publishes what a step did to its cache as one frame, numbered as vLLM's are. A frame arrives some time later, in
order, or not at all. What a number means is decided by ``ingest.sequence``, what a stream is worth by ``ingest.trust``; a
replay brings what was lost, and all that was published meanwhile, as ``ingest.worker`` does it.
"""

from __future__ import annotations

import random as random_module
from collections import deque
from collections.abc import Sequence
from typing import cast

import msgspec

from kvatlas.index import Index
from kvatlas.ingest.sequence import SequenceTracker, Verdict
from kvatlas.ingest.trust import StreamTrust
from kvatlas.observe.metrics import Metrics
from kvatlas.sim.engines import EngineSpec, Happening
from kvatlas.sim.request import Request
from kvatlas.types import GPU, BlockRemoved, BlockStored, EngineHash, EventBatch, StaleReason, Stream, Tier

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


class _Removal:
    """Blocks that went from a tier one after the other: told as one event, since engines tell each by itself."""

    __slots__ = ("keys", "tier")

    def __init__(self, tier: Tier, keys: Sequence[int]) -> None:
        self.tier = tier
        self.keys = list(keys)


_Told = BlockStored | _Removal


class _Frame:
    __slots__ = ("arrives_s", "events", "published_s", "seq")

    def __init__(self, seq: int, published_s: float, arrives_s: float | None, events: list[_Told]) -> None:
        self.seq = seq
        self.published_s = published_s
        self.arrives_s = arrives_s
        """None: it is lost."""
        self.events = events


class EventStream:
    """One engine's frames: those that are under way, and what the index has been told."""

    def __init__(self, stream: Stream, model: str, spec: EngineSpec, index: Index, metrics: Metrics, path: EventPath) -> None:
        self.lost = 0
        self.gaps = 0
        self._stream = stream
        self._model = model
        self._block_size_tokens = spec.block_size_tokens
        self._tiers = (GPU, *(Tier(tier.name) for tier in spec.tiers))
        self._index = index
        self._path = path
        self._tracker = SequenceTracker()
        self._trust = StreamTrust(stream, self._tracker, index, metrics, "simulation", drop_when_stale=False)
        self._under_way: deque[_Frame] = deque()
        self._next_seq = 0
        self._arrives_s = 0.0
        self._open: _Frame | None = None
        """This step's frame, which may still grow."""
        self._healed_s: float | None = None
        """When the replay that is asked for will have come."""

    @property
    def stale(self) -> StaleReason | None:
        return self._trust.stale

    def publish(self, told: Happening, request: Request | None, random: random_module.Random) -> None:
        """Take what a step did: STORED, with the request whose blocks these are, or REMOVED."""
        at_s, _, _, _, first, many, tier, keys = told
        open_frame = self._open if self._open is not None and self._open.published_s == at_s else None
        event: _Told
        if request is None:
            last = open_frame.events[-1] if open_frame is not None else None
            if isinstance(last, _Removal) and last.tier == self._tiers[tier]:
                last.keys += keys
                return
            event = _Removal(self._tiers[tier], keys)
        else:
            event = self._stored(request, first, first + many, self._tiers[tier])
        if open_frame is not None:
            open_frame.events.append(event)
        else:
            self._begin_frame(event, at_s, random)

    def _stored(self, request: Request, first: int, after: int, tier: Tier) -> BlockStored:
        keys, size = request.job_keys, self._block_size_tokens
        return BlockStored(
            cast("tuple[EngineHash, ...]", tuple(keys[first:after])),
            EngineHash(keys[first - 1]) if first else None,
            request.arrival.tokens[first * size : after * size],
            size,
            tier,
        )

    def _begin_frame(self, event: _Told, at_s: float, random: random_module.Random) -> None:
        path = self._path
        arrives_s: float | None = None
        if path.loss and random.random() < path.loss:
            self.lost += 1
        else:
            lag_s = path.lag_s + (random.random() * path.jitter_s if path.jitter_s else 0.0)
            arrives_s = self._arrives_s = max(self._arrives_s, at_s + lag_s)
        self._open = _Frame(self._next_seq, at_s, arrives_s, [event])
        self._next_seq += 1
        self._under_way.append(self._open)
        if len(self._under_way) > PUBLISHED_MAX:
            self.deliver(at_s)  # for want of a decision nobody looked for long
            if len(self._under_way) > PUBLISHED_MAX:
                self._under_way.popleft()

    def deliver(self, now_s: float) -> None:
        """Tell the index what has arrived by now: nobody asks it between two decisions, so before each is soon enough."""
        self._open = None
        events: list[_Told] = []
        while self._under_way:
            if self._healed_s is not None:
                if now_s < self._healed_s:
                    break
                self._apply(events)
                self._replay(self._healed_s)
                events = []
                continue
            frame = self._first_heard(now_s)
            if frame is None:
                break
            payload = _payload(frame)
            if self._tracker.judge(frame.seq, payload) is Verdict.GAP and self._ask(now_s=frame.arrives_s or 0.0):
                continue
            while self._under_way.popleft() is not frame:
                pass  # lost for good
            self._tracker.accept(frame.seq, payload)
            events += frame.events
        self._apply(events)

    def _apply(self, told: Sequence[_Told]) -> None:
        if told:
            events = tuple([_removed(one) if isinstance(one, _Removal) else one for one in told])
            self._index.apply(self._stream, EventBatch(events, model=self._model))

    def _first_heard(self, now_s: float) -> _Frame | None:
        """Return the first frame that is not lost, if it has arrived."""
        for frame in self._under_way:
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
        under_way = self._under_way
        events: list[_Told] = []
        self._healed_s = None
        if under_way[0].seq > (self._tracker.next_seq or 0):
            self._trust.begin(under_way[0].seq)  # the engine does not keep older ones
        while under_way and under_way[0].published_s <= healed_s:
            frame = under_way.popleft()
            self._tracker.accept(frame.seq, _payload(frame))
            events += frame.events
        self._apply(events)
        self._trust.resyncing = False
        self._trust.show()


def _payload(frame: _Frame) -> bytes:
    """Return bytes that are a frame's own."""
    return frame.seq.to_bytes(8, "little")


def _removed(removal: _Removal) -> BlockRemoved:
    return BlockRemoved(cast("tuple[EngineHash, ...]", tuple(removal.keys)), removal.tier)
