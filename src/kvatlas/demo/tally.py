"""What a run of the demo comes to. No IO."""

from __future__ import annotations

import statistics

import msgspec

from kvatlas.demo.turns import InTurns
from kvatlas.demo.users import Sent

MOSTLY, HARDLY = 0.5, 0.1
"""Share of a prompt that was cached: more than the first, less than the second."""

EXACT_MIN = 0.9
"""Share of predictions that has to be exact. What other requests do to a cache between a decision and the moment in which an
engine begins with the prompt cannot be known."""


class EngineTally(msgspec.Struct, frozen=True):
    """One engine's share."""

    name: str
    requests: int
    hit_ratio: float
    ttft_s: float | None
    """Median; None where it had no requests."""


class Tally:
    """Counts requests as they end."""

    def __init__(self, in_turns: InTurns) -> None:
        self.sent: list[Sent] = []
        """In the order of their ends. Bounded by the run's own bounds."""
        self.in_turns_tokens = 0
        """Cached tokens if the same requests had been sent in turns."""
        self._in_turns = in_turns

    def add(self, sent: Sent) -> None:
        self.sent.append(sent)
        if sent.problem is None:
            self.in_turns_tokens += self._in_turns.send(sent.prompt)

    @property
    def answered(self) -> list[Sent]:
        return [one for one in self.sent if one.problem is None]

    @property
    def failed(self) -> list[Sent]:
        return [one for one in self.sent if one.problem is not None]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(one.prompt) for one in self.answered)

    @property
    def hit_ratio(self) -> float:
        return sum(one.cached_tokens for one in self.answered) / max(1, self.prompt_tokens)

    @property
    def in_turns_ratio(self) -> float:
        return self.in_turns_tokens / max(1, self.prompt_tokens)

    def ttft_s(self, *, cached: bool) -> float | None:
        """Return the median time to the first token of prompts that were mostly cached, or hardly."""
        chosen = [one.ttft_s for one in self.answered if _is(one, cached)]
        return statistics.median(chosen) if chosen else None

    @property
    def compared(self) -> list[Sent]:
        """Those of which the router had read in events what would be cached."""
        return [one for one in self.answered if one.predicted_tokens is not None]

    @property
    def exact(self) -> int:
        return sum(one.predicted_tokens == one.cached_tokens for one in self.compared)

    @property
    def holds(self) -> bool:
        """Every request was answered, and predictions are as exact as they can be."""
        compared = len(self.compared)
        return bool(self.answered) and not self.failed and self.exact >= EXACT_MIN * compared > 0

    def engine(self, name: str) -> EngineTally:
        own = [one for one in self.answered if one.engine == name]
        tokens = sum(len(one.prompt) for one in own)
        return EngineTally(
            name,
            len(own),
            sum(one.cached_tokens for one in own) / max(1, tokens),
            statistics.median(one.ttft_s for one in own) if own else None,
        )

    @property
    def cut(self) -> int:
        """Answers that broke off because their engine went."""
        return sum(one.cut for one in self.sent)

    @property
    def moved(self) -> int:
        """Requests that the router sent elsewhere because their engine had gone."""
        return sum(one.moved for one in self.sent)


def _is(one: Sent, cached: bool) -> bool:
    share = one.cached_tokens / max(1, len(one.prompt))
    return share > MOSTLY if cached else share < HARDLY
