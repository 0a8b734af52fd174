"""The project's router as a policy: any configuration, only what it needs, and nothing left over."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvatlas.errors import ConfigError
from kvatlas.sim.changes import EngineJoins, EngineLeaves
from kvatlas.sim.fleet import simulate
from kvatlas.sim.policies import POLICIES, Policy, RouterPolicy, Surroundings, make_policy
from kvatlas.sim.policies.dynamo import Dynamo
from kvatlas.sim.policies.light import InFlight
from kvatlas.sim.reference import ReferenceEngines
from tests.models.workloads import SMALL, shared_prefixes

KSERVE = """
apiVersion: inference.networking.x-k8s.io/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: single-profile-handler}
- {type: prefix-cache-scorer, parameters: {mode: cache_tracking, tokenProcessorConfig: {blockSize: 16}}}
- {type: load-aware-scorer}
- {type: max-score-picker}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: prefix-cache-scorer, weight: 2.0}
  - {pluginRef: load-aware-scorer, weight: 1.0}
  - {pluginRef: max-score-picker}
"""


def kept(name: str) -> tuple[list[Policy], object]:
    """Return what makes a policy, and where it will be found."""
    made: list[Policy] = []

    def make(surroundings: Surroundings) -> Policy:
        made.append(make_policy(name, surroundings))
        return made[0]

    return made, make


@pytest.mark.parametrize("name", POLICIES)
def test_after_a_run_nothing_is_in_flight(name: str) -> None:
    made, make = kept(name)
    workload = shared_prefixes(5, requests=40, per_s=40.0)
    changes = (EngineLeaves(0.4, 0), EngineJoins(0.5, SMALL))
    simulate(workload, make, [SMALL] * 3, seed=1, engines=ReferenceEngines(), changes=changes)  # type: ignore[arg-type]
    (policy,) = made
    if isinstance(policy, RouterPolicy):
        loads = [policy.router.load(endpoint.name).in_flight for endpoint in policy.router.endpoints]
        assert [load.requests for load in loads] == [0, 0, 0]
        assert [load.prefill_tokens for load in loads] == [0, 0, 0]
        assert not policy._flights
    else:
        assert isinstance(policy, InFlight)
        assert list(policy.loads.values()) == [0, 0, 0]
    if isinstance(policy, Dynamo):
        assert set(policy._active.counts.values()) == set(policy._prefill_tokens.values()) == {0}
        assert not policy._prefilling


@pytest.mark.parametrize("name", POLICIES)
def test_only_who_asks_an_index_has_one(name: str) -> None:
    made, make = kept(name)
    simulate(shared_prefixes(5, requests=1, per_s=1.0), make, [SMALL], seed=1, engines=ReferenceEngines())  # type: ignore[arg-type]
    assert (made[0].indexer is not None) is (name in ("dynamo", "llm-d-precise", "kvatlas"))


def test_any_picker_configuration_can_be_played(tmp_path: Path) -> None:
    file = tmp_path / "kserve.yaml"
    file.write_text(KSERVE)
    made, make = kept(str(file))
    workload = shared_prefixes(5, requests=40, per_s=10.0)
    result = simulate(workload, make, [SMALL] * 2, seed=1, engines=ReferenceEngines())  # type: ignore[arg-type]
    assert made[0].indexer is not None
    assert (result.policy, result.finished) == ("kserve", 40)
    assert result.hit_ratio > 0.5


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        simulate(
            shared_prefixes(5, requests=1, per_s=1.0),
            str(tmp_path / "nothing.yaml"),
            [SMALL],
            seed=1,
            engines=ReferenceEngines(),
        )
