"""Who goes first inside a priority band: between tenants, and among one tenant's requests.

Source: llm-d-router, ``plugins/flowcontrol/{fairness,ordering}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from kvatlas.route.flow.item import Item
from kvatlas.route.plugins import NoParameters, Services


@runtime_checkable
class FairnessPolicy(Protocol):
    """Says which requests share a queue. The queues of a band take turns."""

    def queue_of(self, item: Item) -> str:
        """Return the name of the queue."""
        ...


@runtime_checkable
class ChoosesQueue(Protocol):
    """A fairness policy that says whose turn it is, instead of one after the other."""

    def next_queue(self, heads: Mapping[str, Item]) -> str:
        """Return the queue whose request goes next. ``heads``: the first request of each, in the order of turns."""
        ...


@runtime_checkable
class OrderingPolicy(Protocol):
    """Orders the requests of one queue."""

    def due_s(self, item: Item) -> float:
        """Return the time by which it should go: earlier ones go first, of equal ones the one that came first."""
        ...


class _Policy:
    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        self.name = name


class GlobalStrictFairness(_Policy):
    """No turns: a band is one queue, whoever its requests are of."""

    def queue_of(self, item: Item) -> str:
        return ""


class RoundRobinFairness(_Policy):
    """Tenants take turns, one request each."""

    def queue_of(self, item: Item) -> str:
        return item.tenant


class FcfsOrdering(_Policy):
    """First come, first served."""

    def due_s(self, item: Item) -> float:
        return 0.0


class EdfOrdering(_Policy):
    """The one whose client gives up first; those of whom that is not known come after."""

    def due_s(self, item: Item) -> float:
        return item.deadline_s


class SloDeadlineOrdering(_Policy):
    """The one whose first token is due first (header x-llm-d-slo-ttft-ms); those without an objective come after."""

    def due_s(self, item: Item) -> float:
        return math.inf if item.ttft_slo_s is None else item.arrived_s + item.ttft_slo_s
