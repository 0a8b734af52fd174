"""What parameters of workloads may be."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Tokens = Annotated[int, Meta(ge=1, le=10_000_000)]
Rate = Annotated[float, Meta(gt=0, le=1_000_000)]
Seconds = Annotated[float, Meta(ge=0, le=100_000_000)]
Spreading = Annotated[float, Meta(ge=0, le=2)]
"""Sigma of a log-normal length; 0: all alike."""
