"""How long endpoints will take for a request, as a producer predicted it for one decision."""

from __future__ import annotations

import msgspec


class LatencyPrediction(msgspec.Struct, frozen=True):
    """What is expected of one endpoint, were the request sent there."""

    ttft_s: float
    """From sending the request until its first token."""
    tpot_s: float = 0.0
    """From one output token to the next; 0 where it is not predicted."""
