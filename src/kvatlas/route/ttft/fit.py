"""What each of several amounts costs, from observed sums of costs: least squares that forgets. No IO, no clock.

Errors are relative, so that short times count as much as long ones. A step is damped (Levenberg-Marquardt): where all
observations have the same proportions, their sum is learnt and the proportions stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

SURPRISE_MAX = math.log(4)
"""What one observation may say, as a logarithm."""
DAMPING = 0.1
"""Of the diagonal: how well figures have to be told apart before one is moved against the other."""
SHRINK_MAX = 0.5
"""What one observation may leave of a figure; so they stay positive."""


class Fit:
    """Positive figures, so that the sum of amounts times figures is near what was observed."""

    __slots__ = ("_observed", "_products", "figures")

    def __init__(self, figures: Sequence[float]) -> None:
        """``figures``: first guesses, above 0."""
        self.figures = list(figures)
        """Of one of each amount: seconds, where seconds are observed."""
        self._products = [[0.0] * len(figures) for _ in figures]
        """Of amounts by amounts, faded."""
        self._observed = [0.0] * len(figures)
        """Of amounts by observations."""

    def of(self, amounts: Sequence[float]) -> float:
        """Return what is to be expected of such amounts."""
        expected: float = sum(map(mul, self.figures, amounts))
        return expected

    def scale(self, factor: float) -> None:
        """Multiply all figures."""
        self.figures = [figure * factor for figure in self.figures]

    def learn(self, amounts: Sequence[float], error: float, memory: float) -> None:
        """Move towards an observation and those before it, of which about ``memory`` count.

        ``amounts``: at least one is above 0; ``error``: the logarithm of observed over expected.
        """
        fade, expected, figures = 1 - 1 / memory, self.of(amounts), self.figures
        scaled = [amount / expected for amount in amounts]
        equations = []
        for at, amount in enumerate(scaled):
            row = self._products[at] = [
                old * fade + amount * other for old, other in zip(self._products[at], scaled, strict=True)
            ]
            observed = self._observed[at] = self._observed[at] * fade + amount * (1 + error)
            off = observed - sum(map(mul, row, figures))
            equations.append([*row, off])
            equations[at][at] *= 1 + DAMPING
        steps = _solved(equations)
        self.figures = [max(figure + step, figure * SHRINK_MAX) for figure, step in zip(figures, steps, strict=True)]


def _solved(equations: list[list[float]]) -> list[float]:
    """Solve for a symmetric matrix with a damped diagonal; each row ends with its right side. An amount that is always 0: 0."""
    for at, row in enumerate(equations):
        for below in range(at + 1, len(equations)):
            if factor := equations[below][at] and equations[below][at] / row[at]:
                equations[below] = [value - factor * above for value, above in zip(equations[below], row, strict=True)]
    steps = [0.0] * len(equations)
    for at in reversed(range(len(equations))):
        row = equations[at]
        if row[at] > 0:
            steps[at] = (row[-1] - sum(map(mul, row[:-1], steps))) / row[at]
    return steps
