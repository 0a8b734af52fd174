"""What requests add up to: counted as they pass, in about a microsecond each. Thread-safe."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import msgspec

from kvatlas.route.cycle import Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.outcome import Outcome
from kvatlas.serve.dashboard.prefixes import HotPrefixes
from kvatlas.types import BlockKey

TTFTS_MAX = 1_000
"""Times to first token kept between two looks; of more, the latest."""
NAMES_MAX = 10_000
"""Endpoints and reasons that are told apart; beyond it the first ones go on being counted."""


class Totals(msgspec.Struct):
    """Counts since the start."""

    requests: int = 0
    """Routed requests; without a router, queries for scores."""
    prompt_tokens: int = 0
    """Of requests that ended (of queries: at once)."""
    saved_tokens: int = 0
    """Of these, those that were cached: as engines told, else as predicted."""
    told: int = 0
    """Requests whose engine told its cached tokens, and that a prediction was made for."""
    predicted_tokens: int = 0
    actual_tokens: int = 0
    """Cached tokens of those, as predicted and as told."""
    over_tokens: int = 0
    under_tokens: int = 0
    """How far predictions were off: too many, too few."""


class Tally:
    """Counts. Hears of matched prompts from the index, and of decisions and outcomes from a router, where there is one."""

    def __init__(self, block_size_tokens: int, prefixes: HotPrefixes, *, routed: bool) -> None:
        """``routed``: count what is routed, and take questions about scores as those of people who look."""
        self._block_size_tokens = block_size_tokens
        self._prefixes = prefixes
        self._routed = routed
        self._lock = threading.Lock()
        self._totals = Totals()
        self._ttfts_s: deque[float] = deque(maxlen=TTFTS_MAX)
        self.prompts_matched = False
        """Whether the index was asked for any prompt: prefixes are known by its block keys alone."""
        self._sent: dict[str, int] = {}
        self._without_tokens: dict[str, int] = {}

    def matched(self, model: str, keys: Sequence[BlockKey], prompt_tokens: int, held_blocks: int) -> None:
        """Note a prompt that was matched; see :data:`kvatlas.indexer.Matched`."""
        self._prefixes.offer(model, keys, held_blocks)
        self.prompts_matched = True
        if self._routed:
            return
        with self._lock:
            totals = self._totals
            totals.requests += 1
            totals.prompt_tokens += prompt_tokens
            totals.saved_tokens += min(held_blocks * self._block_size_tokens, max(0, prompt_tokens - 1))

    def decided(self, _cycle: Cycle, decision: Decision) -> None:
        """Note a request that was sent somewhere."""
        problem = decision.request.tokens_problem
        with self._lock:
            self._totals.requests += 1
            _count(self._sent, decision.target.name)
            if problem is not None:
                _count(self._without_tokens, problem)

    def finished(self, decision: Decision, endpoint: EndpointName, outcome: Outcome) -> None:
        """Note how it went."""
        predicted, actual = decision.predicted_cached_tokens, outcome.cached_tokens
        prompt_tokens = outcome.prompt_tokens or decision.request.prompt_tokens
        with self._lock:
            totals = self._totals
            totals.prompt_tokens += prompt_tokens
            totals.saved_tokens += min(prompt_tokens, (predicted or 0) if actual is None else actual)
            if outcome.ttft_s is not None:
                self._ttfts_s.append(outcome.ttft_s)
            if predicted is not None and actual is not None and endpoint == decision.target.name:
                totals.told += 1
                totals.predicted_tokens += predicted
                totals.actual_tokens += actual
                totals.over_tokens += max(0, predicted - actual)
                totals.under_tokens += max(0, actual - predicted)

    def totals(self) -> Totals:
        """Return the counts as they are now."""
        with self._lock:
            return msgspec.structs.replace(self._totals)

    def take_ttfts_s(self) -> list[float]:
        """Return the times to first token since the last call."""
        with self._lock:
            taken = list(self._ttfts_s)
            self._ttfts_s.clear()
            return taken

    def sent(self) -> dict[str, int]:
        """Return how many requests were sent to each endpoint."""
        with self._lock:
            return self._sent.copy()

    def forget(self, gone: Sequence[str]) -> None:
        """Drop the counts of endpoints that left."""
        with self._lock:
            for name in gone:
                self._sent.pop(name, None)

    def without_tokens(self) -> dict[str, int]:
        """Return how many requests were routed without their tokens, by reason."""
        with self._lock:
            return self._without_tokens.copy()


def _count(counts: dict[str, int], name: str) -> None:
    if name in counts or len(counts) < NAMES_MAX:
        counts[name] = counts.get(name, 0) + 1
