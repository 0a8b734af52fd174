"""All of llm-d's scorers are found under its names, and do what they should and nothing else."""

from __future__ import annotations

import msgspec
import pytest

from kvatlas.route.plugins import DecisionObserver, Filter, OutcomeObserver, Producer, ResponseHeaders, Scorer, plugin_types
from tests.models.scoring import plugin

DOES: dict[str, tuple[type, ...]] = {
    "active-request-scorer": (Scorer,),
    "burst-prefix-cache-producer": (Producer, DecisionObserver),
    "context-length-aware": (Scorer, Filter),
    "kv-cache-utilization-scorer": (Scorer,),
    "latency-scorer": (Scorer,),
    "load-aware-scorer": (Scorer,),
    "lora-affinity-scorer": (Scorer,),
    "no-hit-lru-scorer": (Scorer, DecisionObserver),
    "prefix-cache-affinity-filter": (Filter,),
    "prefix-cache-scorer": (Scorer,),
    "queue-scorer": (Scorer,),
    "running-requests-size-scorer": (Scorer,),
    "session-affinity-filter": (Filter, DecisionObserver, OutcomeObserver, ResponseHeaders),
    "session-affinity-scorer": (Scorer, DecisionObserver, OutcomeObserver, ResponseHeaders),
    "token-load-scorer": (Scorer,),
}
KINDS = (Producer, Filter, Scorer, DecisionObserver, OutcomeObserver, ResponseHeaders)


@pytest.mark.parametrize("name", DOES)
def test_a_type_is_found_by_its_name_and_does_its_work_alone(name: str) -> None:
    made = plugin(plugin_types()[name].load(), name=name)
    assert {kind for kind in KINDS if isinstance(made, kind)} == set(DOES[name])
    assert made.name == name


@pytest.mark.parametrize("name", DOES)
def test_an_unknown_parameter_is_refused(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        plugin(plugin_types()[name].load(), {"unknown": 1})
