"""Who gets a request that somebody could not take, and how often that may be. Pure."""

from __future__ import annotations

from collections.abc import Callable

from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import Endpoint, EndpointName

BURST_MAX = 10.0
"""Retries that may follow each other however few requests there were."""


class RetryBudget:
    """Lets retries be a share of requests: where everybody fails, they must not double the load."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._left = BURST_MAX

    def request(self) -> None:
        """A request came."""
        self._left = min(BURST_MAX, self._left + self._share)

    def take(self) -> bool:
        """Whether another retry may be made; if so, it counts."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def in_order(decision: Decision) -> list[Endpoint]:
    """Return who could take a request, best first: the targets, then by their totals those whom the same profile considered."""
    targets = list(decision.targets)
    chosen = {target.name for target in targets}
    for run in decision.runs.values():
        if run is not None and any(candidate.name == decision.target.name for candidate in run.picked):
            ranked = sorted(zip(run.totals, run.candidates, strict=True), key=lambda pair: -pair[0])
            return targets + [candidate.endpoint for _, candidate in ranked if candidate.name not in chosen]
    return targets


def next_endpoint(
    endpoints: list[Endpoint], tried: set[str], unreachable: set[str], healthy: Callable[[EndpointName], bool]
) -> Endpoint | None:
    """Return whom to try next; None where nobody is left. ``tried``: names; ``unreachable``: URLs.

    Health is a hint: where nobody is healthy, the best of the others is tried.
    """
    left = [endpoint for endpoint in endpoints if endpoint.name not in tried and endpoint.url not in unreachable]
    return next((endpoint for endpoint in left if healthy(endpoint.name)), left[0] if left else None)
