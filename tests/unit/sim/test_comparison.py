"""Runs beside each other: who is best, and of whom that is said."""

from __future__ import annotations

import pytest

from kvatlas.sim.comparison import FIGURES, PHASE_FIGURES, best, figures, groups, phase_rows, throughput
from kvatlas.sim.report.curves import curves
from tests.models.runs import phase, run_result

TTFT = next(figure for figure in FIGURES if figure.name == "TTFT p50")
HITS = next(figure for figure in FIGURES if figure.name == "hit ratio")


def test_the_best_has_the_lowest_time_and_the_highest_ratio() -> None:
    runs = [run_result("a", 0.2), run_result("b", 0.1, cached_tokens=40_000), run_result("c", 0.3)]
    assert best(TTFT, runs) == {1}
    assert best(HITS, runs) == {1}


def test_all_that_show_as_the_same_are_best_and_nobody_where_all_do() -> None:
    assert best(TTFT, [run_result("a", 0.1000), run_result("b", 0.1001), run_result("c", 0.2)]) == {0, 1}
    assert best(TTFT, [run_result("a", 0.1), run_result("b", 0.1)]) == frozenset()
    assert best(TTFT, [run_result("a", 0.1)]) == frozenset()


def test_clients_who_gave_up_are_shown_where_somebody_did() -> None:
    patient, impatient = run_result("a"), run_result("b", gave_up=3)
    assert "gave up" not in [figure.name for figure in figures([patient])]
    assert [figure.of(impatient) for figure in figures([patient, impatient]) if figure.name == "gave up"] == [3]


def test_what_is_counted_is_shown_whole() -> None:
    run = run_result("a", gave_up=85)
    assert [figure.shown(figure.of(run)) for figure in figures([run]) if figure.name == "gave up"] == ["85"]


def test_runs_are_compared_with_those_that_differ_in_their_policy_alone() -> None:
    runs = [run_result("a", label="qps=1"), run_result("a", label="qps=2"), run_result("b", label="qps=1")]
    assert [[(run.policy, run.label) for run in group] for group in groups(runs)] == [
        [("a", "qps=1"), ("b", "qps=1")],
        [("a", "qps=2")],
    ]


def test_throughput_of_phases_is_their_mean_without_the_warm_up_and_the_time_between() -> None:
    assert throughput(run_result("a")) == 40.0
    run = run_result("a", phases=(phase("warm-up", 90_000), phase("3 QPS", 1000), phase("5 QPS", 3000)))
    assert throughput(run) == pytest.approx(200.0)
    assert throughput(run_result("a", phases=(phase("warm-up", 1000),))) == pytest.approx(100.0)


def test_phases_stand_beside_each_other_also_where_a_run_lacks_one() -> None:
    slow, fast = phase("3 QPS", 1000), phase("5 QPS", 2000)
    runs = [run_result("a", phases=(slow, fast)), run_result("b", phases=(phase("5 QPS", 3000),))]
    assert phase_rows(runs, PHASE_FIGURES[0]) == [("3 QPS", ["100", ""]), ("5 QPS", ["200", "300"])]


# -- curves -------------------------------------------------------------------------------------------------------------


def test_curves_go_over_the_stages_of_a_ladder() -> None:
    ladder = (phase("warm-up", 1), phase("10 QPS", 2000), phase("3 QPS", 1000))
    (one,) = curves([run_result("a", phases=ladder), run_result("b", phases=ladder)])
    assert one.over == "offered load, requests/s"
    assert {policy: [point.at for point in points] for policy, points in one.by_policy.items()} == {"a": [3, 10], "b": [3, 10]}
    assert [point.output_tokens_per_s for point in one.by_policy["a"]] == [100, 200]


def test_curves_go_over_the_first_number_that_was_varied_and_others_are_apart() -> None:
    labels = [
        f"prefix_caching={cached} qps={qps} seed={seed}" for cached in ("true", "false") for qps in (1, 2.5) for seed in (1,)
    ]
    found = curves([run_result("a", label=label) for label in labels])
    assert [(one.over, one.besides) for one in found] == [
        ("qps", "prefix_caching=true seed=1"),
        ("qps", "prefix_caching=false seed=1"),
    ]
    assert [point.at for point in found[0].by_policy["a"]] == [1, 2.5]


@pytest.mark.parametrize("labels", [["", ""], ["seed=1", "seed=2"], ["qps=1"]])
def test_nothing_grows_where_nothing_was_varied_twice(labels: list[str]) -> None:
    assert curves([run_result("a", label=label) for label in labels]) == []
