"""What `simulate` asks, shows and refuses. Runs themselves are in tests/integration/test_simulate.py."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from kvatlas.cli.simulate_list import POLICY_LINES, parameters
from kvatlas.cli.simulate_run import PRESET, ask
from kvatlas.cli.simulate_tables import tables
from kvatlas.errors import ConfigError, KvatlasError, RequestError
from kvatlas.sim.changes import EngineJoins, EngineLeaves, EngineSlows
from kvatlas.sim.policies import POLICIES
from kvatlas.sim.presets import PRESETS
from kvatlas.sim.results import RunResult
from kvatlas.sim.sweep import Axis, Foreign, Question
from kvatlas.sim.workloads.catalog import KINDS
from tests.models.runs import phase, run_result


def printed(*runs: RunResult, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(tables(runs, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def asked(**given: object) -> Question:
    nothing: dict[str, object] = {
        "workload": None, "policies": (), "preset": None, "spec": None, "values": {}, "settings": (), "sweep": (),
    }  # fmt: skip
    return ask(**{**nothing, **given})  # type: ignore[arg-type]


# -- tables -------------------------------------------------------------------------------------------------------------


def test_the_best_of_a_column_is_marked() -> None:
    text = printed(run_result("kvatlas"), run_result("random", 0.5))
    assert re.search(r"kvatlas .*100 ms\*", text)
    assert not re.search(r"random .*500 ms\*", text)
    assert "* is the best of its column" in text


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_tables_fit_their_screen_and_keep_what_matters(width: int) -> None:
    runs = [run_result("kvatlas", label="qps=1"), run_result("a-policy-with-a-rather-long-name", 0.5, label="qps=1")]
    lines = printed(*runs, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(re.search(r"[a-z].* 40\.0 .*\d", line) for line in lines if "ms" in line or " s " in line)


def test_runs_that_differ_in_more_say_in_what() -> None:
    text = printed(run_result("kvatlas", label="qps=1"), run_result("kvatlas", label="qps=2"))
    assert "varied" in text
    assert "qps=2" in text


def test_phases_have_tables_of_their_own() -> None:
    ladder = (phase("warm-up", 500), phase("3 QPS", 1000))
    text = printed(run_result("kvatlas", phases=ladder), run_result("random", phases=ladder))
    assert re.search(r"3 QPS +100 +100", text)
    assert "TTFT p90 by phase" in text


def test_notes_are_told_once_and_of_whom() -> None:
    text = printed(
        run_result("kvatlas", notes=("5 frames of events were lost", "slow")), run_result("random", notes=("slow",), refused=7)
    )
    assert "note: 5 frames of events were lost (kvatlas)" in text
    assert "note: slow (all runs)" in text
    assert "note: 7 requests were longer than any engine's memory (random)" in text


# -- what is asked ------------------------------------------------------------------------------------------------------


def test_nothing_asks_for_something_worth_looking_at() -> None:
    question = asked()
    assert set(question.policies) <= set(POLICIES)
    assert question.workload in KINDS
    assert question.spec == PRESETS[PRESET].spec


def test_policies_are_named_once_or_all() -> None:
    assert asked(policies=["random", "kvatlas", "random"]).policies == ("random", "kvatlas")
    assert asked(policies=["random", "all"]).policies == tuple(POLICIES)


def test_options_beat_what_is_set() -> None:
    question = asked(settings=["qps=3", "gpu-blocks=70"], values={"qps": 4.0}, sweep=["running-max=1,2"])
    assert question.values == {"qps": 4.0, "gpu_blocks": 70}
    assert question.axes == (Axis("running_max", (1, 2)),)


def test_an_engine_of_ones_own_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(
        "gpu_blocks: 77\ncosts: {step_s: 0.5, prefill_token_s: 0.25}\ntiers: [{name: cpu, blocks: 5, load_block_s: 0.1}]\n"
    )
    spec = asked(spec=file).spec
    assert (spec.gpu_blocks, spec.costs.step_s, spec.tiers[0].name) == (77, 0.5, "cpu")
    file.write_text("gpu_blocks: 77\n")
    with pytest.raises(ConfigError, match="costs: is missing"):
        asked(spec=file)


def test_what_happens_to_engines_is_asked_for_by_its_time() -> None:
    question = asked(at=["90s:slow:2:10", "1m30s:leave:0", "0:join"])
    assert question.changes == (EngineSlows(90.0, 2, 10.0), EngineLeaves(90.0, 0), EngineJoins(0.0, question.spec))


def test_requests_that_pass_the_router_by_are_another_workload_and_where_it_goes() -> None:
    assert asked(foreign="no-reuse@0,2").foreign == Foreign("no-reuse", (0, 2))
    assert asked(foreign="no-reuse").foreign == Foreign("no-reuse", ())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"at": ["60s:burn:1"]}, r"--at.*is no change; give TIME:join"),
        ({"at": ["60s:slow:1"]}, r"--at.*is no change"),
        ({"at": ["soon:join"]}, r"--at.*'soon' is no duration"),
        ({"at": ["60s:leave:one"]}, r"--at.*'one' is no engine's number"),
        ({"at": ["60s:slow:1:0"]}, r"--at.*factor: expected more than 0"),
        ({"foreign": "no-reuse@one"}, r"--foreign.*'one' is no engine's number"),
        ({"policies": ["kvatlass"]}, r'did you mean "kvatlas"'),
        ({"policies": ["nowhere.yaml"]}, r"nowhere.yaml"),
        ({"preset": "nope"}, r"--preset.*allowed"),
        ({"preset": "nope", "spec": Path("x")}, r"--spec|--preset"),
        ({"spec": Path("nowhere.yaml")}, r"--spec.*cannot be read"),
        ({"settings": ["groups"]}, r"--set.*sets nothing"),
        ({"sweep": ["qps="]}, r"--sweep.*varies nothing"),
    ],
)
def test_what_is_no_question_is_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises((RequestError, ConfigError, KvatlasError), match=told):
        asked(**given)


# -- the list -----------------------------------------------------------------------------------------------------------


def test_every_policy_and_workload_has_a_line() -> None:
    assert set(POLICY_LINES) == set(POLICIES)
    assert all(POLICY_LINES.values())
    assert all(kind.what for kind in KINDS.values())


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_is_described(name: str) -> None:
    assert all(what for _, _, what in parameters(name))
