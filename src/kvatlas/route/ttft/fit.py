"""Seconds a request and seconds a token, from observed times: two-parameter least squares that forgets. No IO, no clock.

Errors are relative, so that short times count as much as long ones. A step is damped (Levenberg-Marquardt): where all
observations have the same proportions, their sum is learnt and the proportion stays as it was.
"""

from __future__ import annotations

import math

SURPRISE_MAX = math.log(4)
"""What one observation may say, as a logarithm."""
DAMPING = 0.1
"""Of the diagonal: how well two figures have to be told apart before one is moved against the other."""
SHRINK_MAX = 0.5
"""What one observation may leave of a figure; so they stay positive."""


class Fit:
    """Two positive figures, so that ``requests x request_s + tokens x token_s`` is near what was observed."""

    __slots__ = ("_rr", "_rt", "_ry", "_tt", "_ty", "request_s", "token_s")

    def __init__(self, request_s: float, token_s: float) -> None:
        self.request_s, self.token_s = request_s, token_s
        self._rr = self._rt = self._tt = self._ry = self._ty = 0.0

    def of(self, requests: float, tokens: float) -> float:
        """Return the seconds that are to be expected."""
        return self.request_s * requests + self.token_s * tokens

    def scale(self, factor: float) -> None:
        """Multiply both figures."""
        self.request_s *= factor
        self.token_s *= factor

    def learn(self, requests: float, tokens: float, error: float, memory: float) -> None:
        """Move towards an observation and those before it, of which about ``memory`` count.

        ``error``: the logarithm of observed over expected.
        """
        fade, by_s = 1 - 1 / memory, self.of(requests, tokens)
        requests, tokens, observed = requests / by_s, tokens / by_s, 1 + error
        self._rr = rr = self._rr * fade + requests * requests
        self._rt = rt = self._rt * fade + requests * tokens
        self._tt = tt = self._tt * fade + tokens * tokens
        self._ry = ry = self._ry * fade + requests * observed
        self._ty = ty = self._ty * fade + tokens * observed
        off_r, off_t = ry - rr * self.request_s - rt * self.token_s, ty - rt * self.request_s - tt * self.token_s
        rr, tt = rr * (1 + DAMPING), tt * (1 + DAMPING)
        determinant = rr * tt - rt * rt  # above 0: Cauchy-Schwarz, and the damping
        request_s = self.request_s + (tt * off_r - rt * off_t) / determinant
        token_s = self.token_s + (rr * off_t - rt * off_r) / determinant
        self.request_s = max(request_s, self.request_s * SHRINK_MAX)
        self.token_s = max(token_s, self.token_s * SHRINK_MAX)
