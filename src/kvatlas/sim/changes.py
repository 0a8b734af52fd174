"""What happens to a fleet while it runs."""

from __future__ import annotations

import msgspec

from kvatlas.sim.engines import EngineSpec


class EngineJoins(msgspec.Struct, frozen=True, tag="joins"):
    """A new engine, with nothing in its cache. It gets the next free number."""

    at_s: float
    spec: EngineSpec


class EngineLeaves(msgspec.Struct, frozen=True, tag="leaves"):
    """An engine is gone, and what it had with it. Its requests are sent again, from their beginning."""

    at_s: float
    engine: int
    """By its number: those of the beginning are 0, 1, ..., those that join follow in the order of time."""


class EngineSlows(msgspec.Struct, frozen=True, tag="slows"):
    """From then on an engine's steps take ``factor`` times as long as its costs say; 1: as at first."""

    at_s: float
    engine: int
    factor: float


Change = EngineJoins | EngineLeaves | EngineSlows
