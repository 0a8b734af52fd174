"""What was heard of one engine in a few seconds, decoded and added up. Bounded, whatever the engine sends."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence

import zmq.asyncio

from kvatlas.config import EngineSettings
from kvatlas.doctor.announced import announced_blocks
from kvatlas.errors import DecodeError
from kvatlas.ingest.decode import Decoder
from kvatlas.ingest.decode.header import Header, peek_header
from kvatlas.ingest.sequence import SequenceTracker, Verdict
from kvatlas.ingest.sources.zmq import SocketLimits, ZmqReplayer
from kvatlas.ingest.tap import Heard, Tap, TapLimits, TappedEngine
from kvatlas.keys.engine_hashes import HashedBlock
from kvatlas.types import GPU, BlockStored, DpRank, Event, Frame, GroupIdx, Tier

FRAMES_MAX = 100_000
"""Frames looked at in all."""
HASHED_BLOCKS_MAX = 5_000
"""Blocks whose hashes are recomputed, for each engine."""
REPLAY_ANSWER_WITHIN_S = 2.0
"""A replay endpoint has at least this long to answer, however short the listening is."""
BEYOND_HISTORY_SEQ = (1 << 63) - 1
"""No engine has published so many frames: a replay from here on is its end marker alone."""


class EngineSample:
    """Figures of one engine's frames."""

    def __init__(self, heard: Heard, decoder: Decoder, settings: EngineSettings | None = None) -> None:
        self.heard = heard
        self.settings = settings
        self.replay_reached: bool | None = None
        """Whether the replay endpoint answered a question of its own, asked at once; None without such an endpoint."""
        self.topics: Counter[str] = Counter()
        self.ranks: Counter[DpRank | None] = Counter()
        self.lags_s: list[float] = []
        """Of live frames: from the engine's timestamp to receipt."""
        self.events: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.unknown_events: Counter[str] = Counter()
        self.first_seq: int | None = None
        self.duplicates = 0
        self.gaps = 0
        self.frames_missed = 0
        self.restarts = 0
        self.block_sizes: dict[GroupIdx, set[int]] = {}
        self.offloaded: dict[Tier, Counter[str]] = {}
        """Of stored events below the GPU: how many ``with tokens``, and how many ``placeholders``."""
        self.blocks: list[HashedBlock] = []
        """The first blocks whose hashes can be recomputed."""
        self._decoder = decoder
        self._trackers: dict[DpRank | None, SequenceTracker] = {}
        self._written_s: dict[DpRank | None, float] = {}
        """The engine's time of each rank's last frame."""

    @property
    def frames(self) -> int:
        return self.topics.total()

    def take(self, frame: Frame, live: bool) -> None:
        """Add a frame."""
        header = peek_header(frame.payload)
        self.topics[frame.topic] += 1
        self.ranks[header.dp_rank] += 1
        if live and header.timestamp_s is not None:
            self.lags_s.append(frame.received_ns / 1e9 - header.timestamp_s)
        if frame.seq is not None and not self._in_order(header, frame.seq, frame.payload):
            return
        try:
            decoded = self._decoder.decode(frame.payload)
        except DecodeError as error:
            self.faults[error.reason] += 1
            return
        for fault in decoded.faults:
            (self.unknown_events if fault.harmless else self.faults)[fault.reason] += 1
        for batch in decoded.batches:
            for event in batch.events:
                self._take_event(event)
        for block in announced_blocks(frame.payload):
            if len(self.blocks) < HASHED_BLOCKS_MAX:
                self.blocks.append(block)

    def _take_event(self, event: Event) -> None:
        self.events[type(event).__name__] += 1
        if not isinstance(event, BlockStored):
            return
        if event.block_size_tokens is not None:
            self.block_sizes.setdefault(event.group, set()).add(event.block_size_tokens)
        if event.tier != GPU:
            self.offloaded.setdefault(event.tier, Counter())["with tokens" if event.token_ids else "placeholders"] += 1

    def _in_order(self, header: Header, seq: int, payload: bytes) -> bool:
        """Note what the sequence number says; False for a repeated frame.

        One too old to be remembered is a restart if the engine wrote it after the last one.
        """
        rank = header.dp_rank
        if rank not in self._trackers:
            self._trackers[rank] = SequenceTracker()
            self._trackers[rank].reset(seq)
            self.first_seq = seq if self.first_seq is None else min(self.first_seq, seq)
        tracker = self._trackers[rank]
        verdict = tracker.judge(seq, payload)
        last_s = self._written_s.get(rank)
        if verdict is Verdict.OLD:
            older = header.timestamp_s is not None and last_s is not None and header.timestamp_s <= last_s
            verdict = Verdict.DUPLICATE if older else Verdict.RESTART
        if verdict is Verdict.DUPLICATE:
            self.duplicates += 1
            return False
        if verdict is Verdict.GAP:
            self.gaps += 1
            self.frames_missed += seq - (tracker.next_seq or 0)
        elif verdict is Verdict.RESTART:
            self.restarts += 1
            tracker.reset(seq)
        tracker.accept(seq, payload)
        if header.timestamp_s is not None:
            self._written_s[rank] = header.timestamp_s
        return True


def tapped_engines(settings: EngineSettings) -> list[TappedEngine]:
    """Return an engine's ranks: rank r publishes at port + r, and answers replays at the replay port + r."""

    def at(endpoint: str, rank: int) -> str:
        address, _, port = endpoint.rpartition(":")
        return f"{address}:{int(port) + rank}"

    replay = settings.replay_endpoint
    return [
        TappedEngine(at(settings.endpoint, rank), None if replay is None else at(replay, rank))
        for rank in range(settings.dp_ranks)
    ]


async def sample_engines(
    engines: Sequence[EngineSettings], decoders: Sequence[Decoder], duration_s: float
) -> list[EngineSample]:
    """Listen to every rank of all engines for ``duration_s``. ``decoders``: one an engine.

    Meanwhile asks replay endpoints whether they answer, and then for all that they keep: a service that reads the same engine
    is not disturbed by that. Takes up to REPLAY_ANSWER_WITHIN_S where one does not answer.
    """
    ranks = [
        (tapped, decoder, settings)
        for settings, decoder in zip(engines, decoders, strict=True)
        for tapped in tapped_engines(settings)
    ]
    samples: dict[str, EngineSample] = {}

    def take(heard: Heard, frame: Frame, live: bool) -> None:
        samples[heard.engine.endpoint].take(frame, live)

    tap = Tap([tapped for tapped, _, _ in ranks], take, limits=TapLimits(duration_s=duration_s, frames_max=FRAMES_MAX))
    for heard, (tapped, decoder, settings) in zip(tap.heard, ranks, strict=True):
        samples[tapped.endpoint] = EngineSample(heard, decoder, settings)
    probing = asyncio.gather(*(_probe_replay(sample, duration_s) for sample in samples.values()))
    try:
        await tap.run()
        await probing
    finally:
        probing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await probing
    return list(samples.values())


async def _probe_replay(sample: EngineSample, duration_s: float) -> None:
    """Find out whether a replay endpoint answers, whatever comes of listening."""
    endpoint = sample.heard.engine.replay_endpoint
    if endpoint is None:
        return
    context = zmq.asyncio.Context()
    replayer = ZmqReplayer(context, endpoint, max(duration_s, REPLAY_ANSWER_WITHIN_S), SocketLimits())
    try:
        async with contextlib.aclosing(replayer.replay(BEYOND_HISTORY_SEQ)) as frames:
            async for _ in frames:
                break
    except (TimeoutError, OSError):
        sample.replay_reached = False
    else:
        sample.replay_reached = True
    finally:
        context.destroy(linger=0)
