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


class Tried:
    """Whom a request was sent to, and who is next. Health is a hint: where nobody is healthy, the best of the others is."""

    def __init__(self, decision: Decision, healthy: Callable[[EndpointName], bool]) -> None:
        self._decision = decision
        self._healthy = healthy
        self._at = decision.target
        self._names: set[str] = set()
        self._unreachable: set[str] = set()

    @property
    def count(self) -> int:
        """How many could not take it."""
        return len(self._names)

    def first(self) -> Endpoint:
        """Return who is to get the request."""
        target = self._decision.target
        if not self._healthy(target.name):
            self._at = self._choose() or target
        return self._at

    def next(self, *, unreachable: bool) -> Endpoint | None:
        """Return who is next; None where nobody is left. ``unreachable``: so is everybody else at the last one's address."""
        self._names.add(self._at.name)
        if unreachable:
            self._unreachable.add(self._at.url)
        following = self._choose()
        if following is not None:
            self._at = following
        return following

    def _choose(self) -> Endpoint | None:
        left = [one for one in in_order(self._decision) if one.name not in self._names and one.url not in self._unreachable]
        return next((one for one in left if self._healthy(one.name)), left[0] if left else None)


def in_order(decision: Decision) -> list[Endpoint]:
    """Return who could take a request, best first: the targets, then by their totals those whom the same profile considered."""
    targets = list(decision.targets)
    chosen = {target.name for target in targets}
    for run in decision.runs.values():
        if run is not None and any(candidate.name == decision.target.name for candidate in run.picked):
            ranked = sorted(zip(run.totals, run.candidates, strict=True), key=lambda pair: -pair[0])
            return targets + [candidate.endpoint for _, candidate in ranked if candidate.name not in chosen]
    return targets
