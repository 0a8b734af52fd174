"""One request that waits, as queues see it."""

from __future__ import annotations

import math

import msgspec


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """A request that waits. Times are on the router's clock."""

    id: int
    """Unique, and larger for later arrivals."""
    priority: int
    tenant: str
    size_bytes: int
    arrived_s: float
    deadline_s: float = math.inf
    """When its client gives up, as far as that is known."""
    ttft_slo_s: float | None = None
    """How long after its arrival the first token should come."""
