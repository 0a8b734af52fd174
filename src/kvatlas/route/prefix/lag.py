"""How long after a decision the events come that tell of its blocks, and so how long a promise has to last. No IO."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container

from kvatlas.types import BlockKey, Stream

WATCHED_MAX = 2
"""Blocks that are waited for at once. Few, so that each is looked at often: with one look a decision, every second one."""
LAGS_KEPT = 64
LAGS_MIN = 8
"""With fewer observations the shortest time to live is used."""
QUANTILE = 0.95
FACTOR = 2.0
SHARP_S = 0.25


class _Watched:
    __slots__ = ("key", "looked_s", "since_s", "stream")

    def __init__(self, stream: Stream, key: BlockKey, now_s: float) -> None:
        self.stream = stream
        self.key = key
        self.since_s = self.looked_s = now_s


class EventLag:
    """Watches some promised blocks until their events are in the index. Each decision looks at one of them: one key's lookup.

    A lag is known only as well as one looks: the block came between two looks, and the later one is taken. Where they lie
    further apart than a quarter of a second and than half the lag, that says nothing, and is left out: below about ten
    decisions a second promises last the shortest time.

    The time to live is twice the 95th percentile of the last 64 lags, within bounds. Blocks that never come (a request that
    failed, a prompt that the engine did not cache) are no lags.
    """

    def __init__(self, ttl_min_s: float, ttl_max_s: float, holds: Callable[[Stream, BlockKey], bool]) -> None:
        """``holds``: whether the index knows by events that a stream holds a block."""
        self._ttl_min_s = ttl_min_s
        self._ttl_max_s = ttl_max_s
        self._holds = holds
        self._watched: deque[_Watched] = deque()
        """Next to look at first."""
        self._lags_s: deque[float] = deque(maxlen=LAGS_KEPT)
        self.ttl_s = ttl_min_s
        """How long a promise made now should last."""
        self.never_came = 0

    def watch(self, stream: Stream, key: BlockKey, now_s: float) -> None:
        """Wait for a block that was promised just now, if there is room."""
        if len(self._watched) < WATCHED_MAX:
            self._watched.append(_Watched(stream, key, now_s))

    def look(self, now_s: float) -> None:
        """Look whether the next watched block has come."""
        if not self._watched:
            return
        watched = self._watched.popleft()
        lag_s = now_s - watched.since_s
        if self._holds(watched.stream, watched.key):
            if now_s - watched.looked_s <= max(SHARP_S, lag_s / 2):
                self._learn(lag_s)
        elif lag_s > self._ttl_max_s:
            self.never_came += 1
        else:
            watched.looked_s = now_s
            self._watched.append(watched)

    def keep(self, streams: Container[Stream]) -> None:
        """Wait for no stream but these."""
        self._watched = deque(watched for watched in self._watched if watched.stream in streams)

    def _learn(self, lag_s: float) -> None:
        self._lags_s.append(lag_s)
        if len(self._lags_s) >= LAGS_MIN:
            lags_s = sorted(self._lags_s)
            high_s = lags_s[math.ceil(QUANTILE * len(lags_s)) - 1]
            self.ttl_s = min(max(FACTOR * high_s, self._ttl_min_s), self._ttl_max_s)
