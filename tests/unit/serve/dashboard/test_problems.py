"""From facts to problems: each kind is seen, says what to do, and is not seen where there is none."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvatlas.serve.dashboard.problems import SEVERITIES, SinceWhen, problems_of
from kvatlas.serve.dashboard.state import EngineRow, Facts, Limits, Problem, ServiceShown
from kvatlas.types import IndexStats, StaleReason

SERVICE = ServiceShown(
    version="1",
    core="native",
    core_problem=None,
    keys_mode="kvatlas",
    block_size_tokens=16,
    routed=True,
    engines_named=True,
    worker=None,
    worker_starts=1,
    api_ports=(),
)
INDEX = IndexStats(
    blocks=10, entries=10, orphans=0, speculative=0, streams=1, pods=1, bytes_estimated=1, evicted_ttl=0, evicted_size=0,
    evicted_bytes=0,
)  # fmt: skip
FRESH = EngineRow(
    name="a", state="fresh", source="tcp://10.0.0.1:5557", blocks=100, block_sizes_tokens=(16,), lag_s=0.01, event_age_s=1.0,
    replay_answers=True, health="healthy",
)  # fmt: skip


def facts(*rows: EngineRow, service: ServiceShown = SERVICE, ready: bool = True, **grown: float) -> Facts:
    limits = Limits(blocks_max=100, bytes_max=1000, queue_frames=1000)
    grown = {name.replace("__", "."): value for name, value in grown.items()}
    return Facts(
        service=service, ready=ready, not_ready_reason="a replay runs", rows=rows, index=INDEX, limits=limits, grown=grown
    )


def row(**changes: Any) -> EngineRow:
    return msgspec.structs.replace(FRESH, **changes)


def one(found: Facts) -> Problem:
    (problem,) = problems_of(found)
    assert problem.severity in SEVERITIES
    assert problem.title
    assert problem.meaning
    assert problem.remedy
    return problem


def test_a_fleet_that_is_well_has_no_problem() -> None:
    assert problems_of(facts(FRESH, row(name="b"))) == []


def test_nobody_is_a_problem_that_says_how_engines_publish() -> None:
    problem = one(facts())
    assert problem.id == "nobody"
    assert "--kv-events-config" in problem.remedy


@pytest.mark.parametrize("reason", StaleReason)
def test_each_reason_of_staleness_has_its_card_and_its_remedy(reason: StaleReason) -> None:
    problem = one(facts(FRESH, row(name="b", state="stale", stale_reason=reason)))
    assert (problem.id, problem.engines) == (f"stale-{reason.value}", ("b",))
    assert "{" not in problem.remedy


def test_the_card_of_a_failed_replay_says_how_it_failed() -> None:
    problem = one(facts(row(name="b", replay_answers=False, replay_problem="frame 2 is missing in the replay")))
    assert "b: frame 2 is missing in the replay." in problem.meaning


def test_engines_with_one_trouble_share_a_card() -> None:
    rows = [row(name=f"e{number}", state="stale", stale_reason=StaleReason.GAP) for number in range(40)]
    problem = one(facts(*rows))
    assert (len(problem.engines), problem.engines_count) == (5, 40)


def test_an_engine_that_gets_requests_and_sends_no_events() -> None:
    problem = one(facts(FRESH, row(name="b", state="silent", sent=50, source="", block_sizes_tokens=(), replay_answers=None)))
    assert (problem.id, problem.severity, problem.engines) == ("no-events", "error", ("b",))


def test_where_nobody_was_to_send_events_that_is_only_worth_knowing() -> None:
    without = msgspec.structs.replace(SERVICE, engines_named=False)
    quiet = EngineRow(name="a", state="silent", sent=50, health="healthy")
    problem = one(facts(quiet, service=without))
    assert (problem.id, problem.severity) == ("no-events", "info")


def test_an_idle_engine_without_events_is_no_trouble_yet() -> None:
    problem = one(facts(FRESH, EngineRow(name="b", state="connecting", source="tcp://10.0.0.2:5557", sent=3)))
    assert (problem.id, problem.severity) == ("connecting", "info")


def test_block_sizes_that_do_not_go_together() -> None:
    problem = one(facts(FRESH, row(name="b", block_sizes_tokens=(24,))))
    assert problem.id == "block-size-24"
    assert "keys.blockSize" in problem.remedy
    assert problems_of(facts(row(block_sizes_tokens=(64,)))) == []


def test_with_engine_hashes_another_block_size_is_an_error() -> None:
    by_hash = msgspec.structs.replace(SERVICE, keys_mode="engine")
    assert one(facts(row(block_sizes_tokens=(64,)), service=by_hash)).severity == "error"


TOLD = {"told": 100.0}


def test_engine_hashes_that_no_prompt_leads_to() -> None:
    by_hash = msgspec.structs.replace(SERVICE, keys_mode="engine")
    problem = one(facts(FRESH, service=by_hash, actual_tokens=50_000, predicted_tokens=0, under_tokens=50_000, **TOLD))
    assert (problem.id, problem.severity) == ("hash-mismatch", "error")
    assert "keys.engine.algorithm" in problem.remedy


@pytest.mark.parametrize(
    ("predicted", "actual", "name"), [(10_000, 50_000, "predicted-too-little"), (50_000, 10_000, "predicted-too-much")]
)
def test_predictions_that_are_off(predicted: float, actual: float, name: str) -> None:
    grown = {"over_tokens": max(0.0, predicted - actual), "under_tokens": max(0.0, actual - predicted)}
    problem = one(facts(FRESH, predicted_tokens=predicted, actual_tokens=actual, **grown, **TOLD))
    assert problem.id == name


def test_few_or_small_errors_of_predictions_are_none() -> None:
    assert problems_of(facts(FRESH, predicted_tokens=50_000, actual_tokens=49_000, over_tokens=1_000, **TOLD)) == []
    assert problems_of(facts(FRESH, predicted_tokens=0, actual_tokens=50_000, under_tokens=50_000, told=3)) == []


def test_lag_counts_while_events_come() -> None:
    problem = one(facts(row(lag_s=7.5, event_age_s=8.0)))
    assert problem.id == "lag"
    assert "7.5 s" in problem.meaning
    assert problems_of(facts(row(lag_s=7.5, event_age_s=3600.0))) == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("queue", facts(row(queue_depth=600))),
        ("replay", facts(row(replay_answers=False))),
        ("gaps", facts(row(gaps=2), gaps=2)),
        ("orphans", facts(row(orphans=60))),
        ("bound-size", facts(FRESH, evicted__size=10)),
        ("bound-bytes", facts(FRESH, evicted__bytes=10)),
        ("faults", facts(FRESH, fault__damaged=2)),
        ("unknown-events", facts(FRESH, fault__unknown_event=2)),
        ("tokens-unknown_model", facts(FRESH, untold__unknown_model=4)),
        ("health-failing", facts(row(health="failing"))),
        ("health-trial", facts(row(health="trial"))),
        ("health-unreachable", facts(row(health="unreachable"))),
        ("not-ready", facts(FRESH, ready=False)),
        ("core", facts(FRESH, service=msgspec.structs.replace(SERVICE, core_problem="no cargo"))),
        ("worker", facts(FRESH, service=msgspec.structs.replace(SERVICE, worker="0 of 2", worker_starts=3))),
    ],
)
def test_what_else_can_be_wrong(name: str, found: Facts) -> None:
    assert one(found).id == name


def test_the_worst_comes_first() -> None:
    found = problems_of(facts(row(gaps=1), row(name="b", health="unreachable"), row(name="c", queue_depth=900), gaps=1))
    assert [problem.severity for problem in found] == ["error", "warning", "info"]


def test_a_problem_lasts_since_it_was_first_seen_and_begins_anew_when_it_went() -> None:
    since = SinceWhen()
    now = problems_of(facts())
    assert [problem.since_s for problem in since.dated(now, 10.0)] == [10.0]
    assert [problem.since_s for problem in since.dated(now, 20.0)] == [10.0]
    assert since.dated([], 30.0) == ()
    assert [problem.since_s for problem in since.dated(now, 40.0)] == [40.0]
