"""A workload: requests in the order of time, and what users send after an answer."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Protocol

import msgspec


class Arrival(msgspec.Struct, frozen=True):
    """One request on its way into the fleet."""

    at_s: float
    """From the beginning of the run."""
    tokens: array[int]
    """array('I'): the prompt, and behind it the answer that the model will give."""
    prompt_tokens: int
    """How many of them are the prompt."""
    session: int | None = None
    """Who goes on when it is answered."""
    tenant: str = ""
    phase: str = ""
    """Which part of the workload it belongs to, where the workload has parts: results tell of each by itself."""
    patience_s: float | None = None
    """Its client gives up so long after ``at_s`` where no token has come by then."""
    cancel_after_s: float | None = None
    """Its client cancels it then, if it is not answered before."""
    engine: int | None = None
    """It goes to this engine without passing the router, which knows nothing of it; None: the router decides."""

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens


class Workload(Protocol):
    """Requests. Made with a seed, which reproduces them."""

    name: str

    def arrivals(self) -> Iterator[Arrival]:
        """Yield what comes whatever happens, in the order of time; made as it is asked for, so that any length fits."""
        ...

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        """Return what the same user sends next, at ``at_s`` (the end of the answer) or later; None: nothing."""
        ...
