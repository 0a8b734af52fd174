"""A request in a simulated fleet, from its arrival to its end."""

from __future__ import annotations

from array import array

from kvatlas.sim.workloads.workload import Arrival


class Request:
    """What is known of one that is not answered yet. Policies read it; the fleet writes it."""

    __slots__ = (
        "arrival",
        "arrived_s",
        "cached_tokens",
        "engine",
        "first_token_s",
        "id",
        "job_keys",
        "keys",
        "loaded_tokens",
        "prompt_blocks",
        "routed",
        "scheduled_s",
        "sent_s",
    )

    def __init__(self, id: int, arrival: Arrival, arrived_s: float, keys: array[int], prompt_blocks: int) -> None:  # noqa: A002
        self.id = id
        self.arrival = arrival
        self.arrived_s = arrived_s
        self.keys = keys
        """array('Q'): block keys of prompt and answer, at the fleet's block size."""
        self.prompt_blocks = prompt_blocks
        """How many of them are the prompt's."""
        self.job_keys = keys
        """The same at its engine's block size."""
        self.routed = True
        """Whether the policy chose its engine."""
        self.engine = -1
        self.sent_s = arrived_s
        """When it was sent to its engine: later than it arrived where another engine had it before."""
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.cached_tokens = 0
        """Of the prompt: what the engine had, in any tier."""
        self.loaded_tokens = 0
        """Of these, those that were loaded from a slower tier."""

    @property
    def foreign(self) -> bool:
        """Whether it never passed the router."""
        return self.arrival.engine is not None

    @property
    def prompt(self) -> array[int]:
        """array('I'): a copy of the prompt's tokens."""
        return self.arrival.tokens[: self.arrival.prompt_tokens]

    def sent(self, engine: int, now_s: float) -> None:
        """Note that it is at an engine, and that nothing of it is computed there."""
        self.engine = engine
        self.sent_s = now_s
        self.scheduled_s = self.first_token_s = None
        self.cached_tokens = self.loaded_tokens = 0
