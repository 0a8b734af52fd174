"""From measured times to an engine's costs: least squares over relative errors, no cost below 0. No IO."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec

from kvatlas.sim.costs import EngineCosts

SINGULAR = 1e-10
"""Of a column's own square: what is left of it beside the others has to be more for it to be told apart."""

_COSTS = tuple(EngineCosts.__struct_fields__)


class PromptTime(msgspec.Struct, frozen=True):
    """The time to the first token of one request that an idle engine had cached nothing of."""

    prompt_tokens: int
    ttft_s: float


class StepTime(msgspec.Struct, frozen=True):
    """The mean time of a step in which ``requests`` got a token each, with so many tokens in the cache all together."""

    requests: int
    context_tokens: float
    step_s: float


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, and what the costs make of it."""

    what: str
    measured_s: float
    fitted_s: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is 10 % too long."""
        return self.fitted_s / self.measured_s - 1


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's costs."""

    costs: EngineCosts
    request_s: float
    """Of a request beside its steps: HTTP, the tokenizer, the way there. The simulator has none of it."""
    times: tuple[Fitted, ...]
    unknown: tuple[str, ...]
    """Costs that the measurements cannot tell: they are 0."""

    @property
    def error_mean(self) -> float:
        return sum(abs(one.error) for one in self.times) / len(self.times)

    @property
    def error_max(self) -> float:
        return max(abs(one.error) for one in self.times)


def fit(prompts: Sequence[PromptTime], steps: Sequence[StepTime], step_tokens_max: int) -> Fit:
    """Return the costs under which the times are as near to the measured ones as they get.

    ``step_tokens_max``: prompts longer than this take several steps. Raises ValueError without any times.
    """
    if not prompts or not steps:
        raise ValueError("times of prompts and of steps are needed")
    # step_s, prefill_token_s, prefill_context_s, decode_request_s, decode_context_s, request_s
    rows = [[float(-(-p.prompt_tokens // step_tokens_max)), p.prompt_tokens, p.prompt_tokens**2 / 2, 0, 0, 1] for p in prompts]
    rows += [[1, 0, 0, s.requests, s.context_tokens, 0] for s in steps]
    times = [p.ttft_s for p in prompts] + [s.step_s for s in steps]
    relative = [[value / time_s for value in row] for row, time_s in zip(rows, times, strict=True)]
    *found, request_s = least_squares(relative, [1.0] * len(times))
    names = [f"first token, prompt of {p.prompt_tokens:,} tokens" for p in prompts]
    names += [f"step, {s.requests} x {s.context_tokens / s.requests:,.0f} tokens" for s in steps]
    fitted = [sum(a * b for a, b in zip(row, (*found, request_s), strict=True)) for row in rows]
    return Fit(
        costs=EngineCosts(**dict(zip(_COSTS, found, strict=True))),
        request_s=request_s,
        times=tuple(
            Fitted(what=name, measured_s=time_s, fitted_s=there)
            for name, time_s, there in zip(names, times, fitted, strict=True)
        ),
        unknown=tuple(name for name, value in zip(_COSTS, found, strict=True) if value == 0),
    )


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Return x, nowhere below 0, with the least squares of ``rows * x - values``; for a handful of unknowns.

    Every set of unknowns that may be above 0 is tried: what solves it, is nowhere below 0 and comes nearest is the answer.
    """
    count = len(rows[0])
    scales = [sum(row[i] ** 2 for row in rows) ** 0.5 or 1.0 for i in range(count)]
    scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    best, nearest = [0.0] * count, sum(value**2 for value in values)
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            solved = _solve([[row[i] for i in chosen] for row in scaled], values)
            if solved is None or min(solved) < 0:
                continue
            apart = sum(
                (sum(row[i] * x for i, x in zip(chosen, solved, strict=True)) - value) ** 2
                for row, value in zip(scaled, values, strict=True)
            )
            if apart < nearest:
                nearest, best = apart, [0.0] * count
                for i, x in zip(chosen, solved, strict=True):
                    best[i] = x / scales[i]
    return best


def _solve(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float] | None:
    """Return the least squares of ``rows * x - values`` (Cholesky); None where columns depend on each other."""
    count = len(rows[0])
    square = [[sum(row[i] * row[j] for row in rows) for j in range(count)] for i in range(count)]
    right = [sum(row[i] * value for row, value in zip(rows, values, strict=True)) for i in range(count)]
    lower = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i + 1):
            rest = square[i][j] - sum(lower[i][k] * lower[j][k] for k in range(j))
            if i != j:
                lower[i][j] = rest / lower[j][j]
            elif rest > SINGULAR:
                lower[i][i] = rest**0.5
            else:
                return None
    forward = [0.0] * count
    for i in range(count):
        forward[i] = (right[i] - sum(lower[i][k] * forward[k] for k in range(i))) / lower[i][i]
    solved = [0.0] * count
    for i in reversed(range(count)):
        solved[i] = (forward[i] - sum(lower[k][i] * solved[k] for k in range(i + 1, count))) / lower[i][i]
    return solved
