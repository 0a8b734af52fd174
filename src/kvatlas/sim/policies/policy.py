"""What a routing policy is, to the fleet: told what a router would be told, asked where requests go."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from kvatlas.indexer import Indexer
from kvatlas.route.outcome import End
from kvatlas.sim.engines import EngineSpec, EngineState
from kvatlas.sim.request import Request

MODEL = "model"
"""What all engines of a simulated fleet serve."""


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy is made with."""

    clock: Callable[[], float]
    """Virtual seconds."""
    random: random.Random
    block_size_tokens: int
    """Of the keys of requests, and of the index: the smallest of the fleet's."""
    blocks: int
    """That the fleet's engines hold together, at the beginning."""


class Policy(Protocol):
    """Chooses engines. Engines go by their numbers."""

    name: str
    hears_reports: bool
    """Whether it looks at what engines say of themselves; where nobody does, nobody asks them."""
    indexer: Indexer | None
    """Whose index is to hear the engines' events, under the names of :func:`engine_name`; None: nobody needs them."""

    @property
    def notes(self) -> Sequence[str]:
        """What was degraded."""
        ...

    def joins(self, engine: int, spec: EngineSpec) -> None:
        """An engine takes requests from now on."""
        ...

    def leaves(self, engine: int) -> None:
        """An engine is gone. Its requests have been told as ended."""
        ...

    def reports(self, states: Mapping[int, EngineState], at_s: float) -> None:
        """All engines' metrics were read."""
        ...

    def choose(self, request: Request) -> int:
        """Return who gets a request. It is there from now on. There is one engine at least."""
        ...

    def first_token(self, request: Request, at_s: float) -> None:
        """A request got its first token."""
        ...

    def ended(self, request: Request, at_s: float, end: End) -> None:
        """A request left its engine (``request.engine``): answered (``End.DONE``), or why it was not."""
        ...


def engine_name(engine: int) -> str:
    """Return an engine's name: of its events' stream, and in results."""
    return f"engine-{engine}"
