"""Whose requests go first by how much each tenant has had of the engines.

Source: llm-d-router, ``plugins/flowcontrol/fairness/program-aware``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.flow.item import Item
from kvatlas.route.outcome import Outcome
from kvatlas.route.plugins import Services

INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2
"""What a token costs, in weighted tokens."""
TENANTS_MAX = 16_384
"""Beyond it whoever was served longest ago is forgotten."""

NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class ProgramAwareFairness:
    """The tenant who was served least goes first, and a little whose request has waited longest.

    What was served counts when a request ends, and fades: by half in each half-life. A turn costs O(tenants that wait).
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        strategy: Literal["", "las"] = "las"
        las_weight_service: NotNegative = 0.8
        las_weight_head_wait: NotNegative = 0.2
        las_half_life_seconds: NotNegative = 60.0
        """0: what was served never fades."""
        eviction_ttl_seconds: NotNegative = 3600.0
        """Who was not served for so long is forgotten; 0: nobody."""
        eviction_sweep_seconds: Annotated[float, msgspec.Meta(gt=0)] = 300.0
        """Without effect: who is to be forgotten is, whenever a request ends."""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self.name = name
        self._given = parameters
        self._clock = services.clock
        self._served: OrderedDict[str, _Served] = OrderedDict()
        """Who was served last is last."""

    def queue_of(self, item: Item) -> str:
        return item.tenant

    def next_queue(self, heads: Mapping[str, Item]) -> str:
        now_s = self._clock()
        little_served = _ranks({tenant: -self.served(tenant, now_s) for tenant in heads})
        waited = _ranks({tenant: now_s - head.arrived_s for tenant, head in heads.items()})
        service, wait = self._given.las_weight_service, self._given.las_weight_head_wait
        return max(heads, key=lambda tenant: service * little_served[tenant] + wait * waited[tenant])

    def finished(self, decision: Decision, endpoint: EndpointName, outcome: Outcome) -> None:
        tenant, now_s = decision.request.fairness_id, self._clock()
        prompt_tokens = decision.request.prompt_tokens if outcome.prompt_tokens is None else outcome.prompt_tokens
        cost = INPUT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * (outcome.output_tokens or 0)
        self._served[tenant] = _Served(self.served(tenant, now_s) + cost, now_s)
        self._served.move_to_end(tenant)
        self._forget(now_s)

    def served(self, tenant: str, now_s: float) -> float:
        """Return what is left of what a tenant was served, in weighted tokens."""
        found = self._served.get(tenant)
        if found is None:
            return 0.0
        half_life_s = self._given.las_half_life_seconds
        return found.tokens * 2.0 ** (-(now_s - found.at_s) / half_life_s) if half_life_s else found.tokens

    def _forget(self, now_s: float) -> None:
        ttl_s = self._given.eviction_ttl_seconds
        while len(self._served) > TENANTS_MAX or (ttl_s and now_s - next(iter(self._served.values())).at_s > ttl_s):
            self._served.popitem(last=False)


class _Served(msgspec.Struct, frozen=True):
    tokens: float
    """Weighted, as of ``at_s``."""
    at_s: float


def _ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Return each value's place between the least (0) and the greatest (1); where all are equal, in the middle."""
    least, greatest = min(values.values()), max(values.values())
    if least == greatest:
        return dict.fromkeys(values, 0.5)
    return {name: (value - least) / (greatest - least) for name, value in values.items()}
