"""How busy a pool with roles is, with what was sent to it since its engines last reported."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kvatlas.route.cycle import Candidate
from kvatlas.route.endpoint import ROLE_LABEL
from kvatlas.route.filters import DECODES, PREFILLS
from kvatlas.route.flow.saturation import LaggingDetector, SaturationDetector

SENT_MAX = 10_000
"""Requests sent that no report shows yet: beyond, the oldest are taken as seen."""


class PoolGauge:
    """Reads a detector for a whole pool: the scarcer of its prefill and its decode endpoints counts.

    A detector that goes by reports sees a request only some time after it was sent. Until then the gauge adds it, so that a
    free place does not let a whole queue go before the engines say what became of it.
    """

    def __init__(self, detector: SaturationDetector) -> None:
        self._detector = detector
        self._sent_s: deque[float] = deque(maxlen=SENT_MAX)

    def sent(self, now_s: float) -> None:
        """Note that a request was let go."""
        if isinstance(self._detector, LaggingDetector):
            self._sent_s.append(now_s)

    def saturation(self, candidates: Sequence[Candidate], now_s: float) -> float | None:
        """Return how busy the pool is; None where it has nobody to decode, so that no request can be served."""
        roles = [one.endpoint.labels.get(ROLE_LABEL) for one in candidates]
        decode = [one for one, role in zip(candidates, roles, strict=True) if not role or role in DECODES]
        if not decode:
            return None
        prefill = [one for one, role in zip(candidates, roles, strict=True) if role in PREFILLS]
        unseen = self._unseen_cost(candidates, now_s)
        busiest = self._detector.saturation(decode, now_s) + unseen / len(decode)
        if prefill:
            busiest = max(busiest, self._detector.saturation(prefill, now_s) + unseen / len(prefill))
        return busiest

    def _unseen_cost(self, candidates: Sequence[Candidate], now_s: float) -> float:
        """Return what requests that no report shows may add, to all endpoints together."""
        if not self._sent_s or not isinstance(self._detector, LaggingDetector):
            return 0.0
        lag = self._detector.lag(candidates, now_s)
        if lag is None:
            return 0.0
        while self._sent_s and self._sent_s[0] < lag.seen_s:
            self._sent_s.popleft()
        on_their_way = sum(candidate.load.in_flight.requests for candidate in candidates)
        unseen = min(len(self._sent_s), on_their_way)  # some have come back already
        return unseen * lag.per_request
