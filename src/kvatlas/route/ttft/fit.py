"""What each of several amounts costs, from observed sums of costs: least squares that forgets. No IO, no clock.

Errors are relative, so that short times count as much as long ones. A step is damped (Levenberg-Marquardt): where all
observations have the same proportions, their sum is learnt and the proportions stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
        self._products = [[0.0] * (at + 1) for at in range(len(figures))]
        """Of amounts by amounts, faded: the lower half of a symmetric matrix."""
        self._observed = [0.0] * len(figures)
        """Of amounts by observations."""

    def of(self, amounts: Sequence[float]) -> float:
        """Return what is to be expected of such amounts."""
        return sum([figure * amount for figure, amount in zip(self.figures, amounts, strict=True)])

    def scale(self, factor: float) -> None:
        """Multiply all figures."""
        self.figures = [figure * factor for figure in self.figures]

    def learn(self, amounts: Sequence[float], error: float, memory: float) -> None:
        """Move towards an observation and those before it, of which about ``memory`` count.

        ``amounts``: at least one is above 0; ``error``: the logarithm of observed over expected.
        """
        fade, expected, figures = 1 - 1 / memory, self.of(amounts), self.figures
        scaled = [amount / expected for amount in amounts]
        off = []
        for at, (amount, row) in enumerate(zip(scaled, self._products, strict=True)):
            for other in range(at + 1):
                row[other] = row[other] * fade + amount * scaled[other]
            self._observed[at] = self._observed[at] * fade + amount * (1 + error)
        for at, observed in enumerate(self._observed):
            off.append(observed - sum(self._product(at, other) * figure for other, figure in enumerate(figures)))
        steps = _solved(self._products, off)
        self.figures = [max(figure + step, figure * SHRINK_MAX) for figure, step in zip(figures, steps, strict=True)]

    def _product(self, at: int, other: int) -> float:
        return self._products[at][other] if other <= at else self._products[other][at]


def _solved(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Solve for a symmetric matrix, of which the lower half is given and the diagonal is damped: by Cholesky's rows."""
    rows: list[list[float]] = []
    made: list[float] = []
    for at, given in enumerate(matrix):
        row: list[float] = []
        for other in range(at):
            left = given[other] - sum(a * b for a, b in zip(row, rows[other], strict=False))
            row.append(left / rows[other][other] if rows[other][other] else 0.0)
        rest = given[at] * (1 + DAMPING) - sum(a * a for a in row)
        row.append(math.sqrt(rest) if rest > 0 else 0.0)  # 0: an amount that is always 0
        rows.append(row)
        made.append((right[at] - sum(a * b for a, b in zip(row, made, strict=False))) / row[at] if row[at] else 0.0)
    for at in reversed(range(len(rows))):
        later = sum(rows[below][at] * made[below] for below in range(at + 1, len(rows)))
        made[at] = (made[at] - later) / rows[at][at] if rows[at][at] else 0.0
    return made
