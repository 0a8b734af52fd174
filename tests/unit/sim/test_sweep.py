"""From a question to its runs: all combinations, checked before the first one begins."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvatlas.errors import ConfigError
from kvatlas.sim.changes import EngineJoins, EngineLeaves, EngineSlows
from kvatlas.sim.engines import TierSpec
from kvatlas.sim.plan import Plan, run
from kvatlas.sim.sweep import Axis, Foreign, Question, plans, value_of
from kvatlas.sim.workloads.catalog import choose
from tests.models.runs import SPEC


def question(*axes: Axis, workload: str = "chats", **values: Any) -> Question:
    return Question(policies=("kvatlas", "random"), workload=workload, spec=SPEC, values=values, axes=axes)


def test_values_go_to_the_run_the_workload_and_the_engines() -> None:
    first, second = plans(question(engines=3, qps=7, gpu_blocks=900, seed=5, event_loss=0.1, **{"costs.step_s": 0.5}))
    assert (first.policy, second.policy) == ("kvatlas", "random")
    assert (first.engines, first.seed, first.event_loss) == (3, 5, 0.1)
    assert first.workload.parameters.qps == 7  # type: ignore[attr-defined]
    assert (first.spec.gpu_blocks, first.spec.costs.step_s, first.spec.costs.prefill_token_s) == (900, 0.5, 1e-4)


def test_all_combinations_run_and_policies_of_one_stand_together() -> None:
    made = plans(question(Axis("qps", (5, 10)), Axis("gpu_blocks", (100, 200))))
    assert [(plan.policy, plan.label) for plan in made[:4]] == [
        ("kvatlas", "qps=5 gpu_blocks=100"),
        ("random", "qps=5 gpu_blocks=100"),
        ("kvatlas", "qps=5 gpu_blocks=200"),
        ("random", "qps=5 gpu_blocks=200"),
    ]
    assert len(made) == 8
    assert [plan.spec.gpu_blocks for plan in made[::2]] == [100, 200, 100, 200]


def test_engines_that_join_are_as_the_runs_and_foreign_requests_have_parameters_of_their_own() -> None:
    changes = (EngineJoins(5.0, SPEC), EngineSlows(7.0, 0, 3.0))
    values = {"foreign.qps": 3, "gpu_blocks": 70, "patience_s": 2, "report_every_s": 1e9}
    asked = Question(
        policies=("random",), workload="chats", spec=SPEC, values=values, changes=changes, foreign=Foreign("no-reuse", (1,))
    )
    (plan,) = plans(asked)
    assert plan.changes == (EngineJoins(5.0, plan.spec), EngineSlows(7.0, 0, 3.0))
    assert plan.spec.gpu_blocks == 70
    assert plan.foreign == choose("no-reuse", {"qps": 3})
    assert (plan.foreign_engines, plan.patience_s, plan.report_every_s) == ((1,), 2, 1e9)


def test_a_run_with_all_that_may_happen_is_the_same_again() -> None:
    plan = Plan(
        policy="kvatlas",
        workload=choose("chats", {"qps": 20, "duration_s": 10}),
        spec=SPEC,
        engines=2,
        patience_s=0.3,
        cancel_share=0.2,
        cancel_after_s=1.0,
        foreign_share=0.2,
        foreign=choose("no-reuse", {"qps": 5}),
        foreign_engines=(1,),
        changes=(EngineSlows(2.0, 0, 5.0), EngineJoins(4.0, SPEC)),
    )
    results = [msgspec.structs.replace(run(plan), wall_s=0.0) for _ in range(2)]
    assert results[0] == results[1]
    result = results[0]
    assert min(result.gave_up, result.cancelled, result.foreign) > 0
    assert result.arrived == result.finished + result.gave_up + result.cancelled


def test_tiers_stay_where_other_fields_are_changed() -> None:
    tier = TierSpec(name="cpu", blocks=10, load_block_s=0.1)
    spec = type(SPEC)(costs=SPEC.costs, gpu_blocks=10, tiers=(tier,))
    (plan,) = plans(Question(policies=("random",), workload="chats", spec=spec, values={"running_max": 4}))
    assert (plan.spec.tiers, plan.spec.running_max) == ((tier,), 4)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"gropus": 1}, "gropus.*chats.*allowed: qps.*gpu_blocks.*costs.step_s"),
        ({"groups": 1}, "groups"),
        ({"engines": 0}, "engines"),
        ({"scale": 0}, "scale"),
        ({"event_loss": 2}, "event_loss"),
        ({"limit": 0}, "limit"),
        ({"patience_s": 0}, "patience_s"),
        ({"cancel_share": 2}, "cancel_share"),
        ({"report_every_s": 0}, "report_every_s"),
        ({"foreign.qps": 1}, "foreign.qps: is set without --foreign"),
        ({"gpu_blocks": "many"}, "gpu_blocks"),
        ({"qps": -1}, "qps"),
    ],
)
def test_what_cannot_be_set_is_refused_by_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        plans(question(**given))


def test_engines_that_never_are_there_are_refused_before_anything_runs() -> None:
    joins = EngineJoins(1.0, SPEC)
    asked = question(engines=2)
    for changes in ((EngineLeaves(9.0, 2),), (joins, EngineSlows(9.0, 3, 2.0))):
        with pytest.raises(ConfigError, match=r"--at: there is no engine [23]; allowed: 0 to [12]"):
            plans(msgspec.structs.replace(asked, changes=changes))
    with pytest.raises(ConfigError, match="--foreign: there is no engine 2"):
        plans(msgspec.structs.replace(asked, foreign=Foreign("no-reuse", (0, 2))))
    assert plans(msgspec.structs.replace(asked, foreign=Foreign("no-reuse", (0, 2)), changes=(joins,)))


def test_a_kind_of_trace_wants_its_file() -> None:
    with pytest.raises(ConfigError, match="'mooncake' is a trace without its file"):
        plans(msgspec.structs.replace(question(), workload="mooncake"))


def test_bad_values_of_a_sweep_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="qps"):
        plans(question(Axis("qps", (5, "x"))))
    with pytest.raises(ConfigError, match="qps: is set and varied"):
        plans(question(Axis("qps", (5, 6)), qps=4))
    with pytest.raises(ConfigError, match="at most 10000"):
        plans(question(Axis("seed", tuple(range(10_000)))))


def test_values_are_read_as_they_are_written() -> None:
    read = [value_of(text) for text in ("5", "0.5", "true", "null", "15:50 3:20", "trace.jsonl", "[1]", "")]
    assert read == [5, 0.5, True, None, "15:50 3:20", "trace.jsonl", "[1]", ""]
