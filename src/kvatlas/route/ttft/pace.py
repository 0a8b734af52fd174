"""How much longer an answer takes for each request that an engine answers beside it. No IO, no clock."""

from __future__ import annotations

import math

from kvatlas.route.ttft.fit import SURPRISE_MAX, Fit

STEP_S, CROWD_S = 0.02, 1e-4
"""First guesses: of a token of an answer, and of it for each request that is answered at the time."""
PACE_MEMORY = 256
"""Answers over which this is averaged: crowds differ by less than queues do."""
LENGTH_MEMORY = 64


class Pace:
    """Seconds an output token as a line over the requests that are answered together, and how long answers are."""

    __slots__ = ("_fit", "_tokens")

    def __init__(self) -> None:
        self._fit = Fit((STEP_S, CROWD_S))
        self._tokens: float | None = None

    @property
    def crowd_s(self) -> float:
        """By which one more request delays an average answer; 0 where no answer's length was ever told."""
        return 0.0 if self._tokens is None else self._fit.figures[1] * self._tokens

    def learn(self, together: float, tokens: int, took_s: float) -> None:
        """Take in an answer: how many were answered together with it, itself included, its tokens but the first, their time."""
        error = math.log(max(took_s, 1e-6) / tokens / self._fit.of((1.0, together)))
        self._fit.learn((1.0, together), max(-SURPRISE_MAX, min(SURPRISE_MAX, error)), PACE_MEMORY)
        self._tokens = tokens if self._tokens is None else self._tokens + (tokens - self._tokens) / LENGTH_MEMORY
