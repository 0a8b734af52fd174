"""What a stream's entries are worth: its sequence, its link, and what has gone wrong so far."""

from __future__ import annotations

from kvatlas.index import Index
from kvatlas.ingest.apply import Applied
from kvatlas.ingest.sequence import SequenceTracker
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.types import GPU, StaleReason, Stream, Tier

log = get_logger("kvatlas.ingest")


class StreamTrust:
    """Decides when a stream is stale and when it is exact again, and tells the index. No IO.

    A *flaw* stays until the stream has been replayed from frame 0, or its engine restarted or emptied its cache: whatever was
    missed before does not matter then. The reset of an engine that has lower tiers empties the device only, and heals nothing.
    """

    def __init__(
        self, stream: Stream, tracker: SequenceTracker, index: Index, metrics: Metrics, source: str, *, drop_when_stale: bool
    ) -> None:
        self.names: dict[str, object] = {"pod": stream.pod, "dp_rank": stream.dp_rank, "source": source}
        self.restarts = 0
        self.connected = True
        self.verified = True
        """False after a reconnect, until a replay has shown what was missed."""
        self.overflowed = False
        self.resyncing = False
        self.flaw: StaleReason | None = None
        self._stream = stream
        self._tracker = tracker
        self._index = index
        self._metrics = metrics
        self._drop_when_stale = drop_when_stale
        self._tiers: set[Tier] = set()
        self._until_replayed = False

    @property
    def stale(self) -> StaleReason | None:
        """Why the stream's entries may be wrong now; None if they are exact."""
        if not self.connected:
            return StaleReason.DISCONNECTED
        if self.overflowed:
            return StaleReason.QUEUE_FULL
        if self.resyncing:
            return StaleReason.RESYNCING
        return self.flaw or (None if self.verified else StaleReason.DISCONNECTED)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Where blocks were stored to, since the stream began anew."""
        return tuple(sorted(self._tiers.copy()))  # another thread may add one

    def show(self) -> None:
        """Tell the index how things stand."""
        self._index.mark(self._stream, self.stale)

    def spoil(self, reason: StaleReason, *, until_replayed: bool = False) -> None:
        """Events were missed for good: entries may be wrong from now on.

        ``until_replayed``: those missed may be newer than the ones that come next, so that an emptied cache heals nothing.
        """
        self.flaw = reason
        self._until_replayed = until_replayed
        if self._drop_when_stale:
            self._index.drop(self._stream)
        self.show()
        log.warning("stream is stale", reason=reason.value, **self.names)

    def begin(self, seq: int) -> None:
        """Begin anew with frame ``seq``: exact from 0; from later on, only what the engine says from there is known."""
        self._index.drop(self._stream)
        self._tracker.reset(seq)
        self._tiers.clear()
        self.verified = True
        self.flaw = None if seq == 0 else StaleReason.HISTORY_INCOMPLETE
        self.show()
        if seq:
            log.warning("older frames can't be had: entries are those since", seq=seq, **self.names)

    def engine_restarted(self) -> None:
        """The engine is a new process: all it held is gone, and its frames count from 0."""
        self.restarts += 1
        self._metrics.restart(self._stream.pod)
        log.warning("engine restarted: its entries are dropped", **self.names)
        self.begin(0)

    def learn(self, applied: Applied) -> None:
        """Take account of what frames did."""
        self._tiers |= applied.tiers
        if applied.faults:
            self.spoil(StaleReason.DECODE_ERROR)
        elif applied.cleared and self.flaw is not None and not self._until_replayed and self._tiers <= {GPU}:
            log.info("engine emptied its cache: stream is exact again", **self.names)
            self.flaw = None
            self.verified = True
            self.show()
