"""LoRA adapters: where one runs, could be loaded, or waits."""

from __future__ import annotations

from kvatlas.route.cycle import Candidate
from kvatlas.route.scorers.lora import LoraAffinityScorer
from tests.models.scoring import candidate, cycle, plugin


def engine(running: str = "", waiting: str = "", most: int | None = 2) -> Candidate:
    return candidate("a", loras_running=frozenset(running.split()), loras_waiting=frozenset(waiting.split()), loras_max=most)


def score(engine: Candidate, **request: str) -> float:
    (found,) = plugin(LoraAffinityScorer).score(cycle([engine], **(request or {"model": "x"})), [engine])
    return float(found)


def test_an_adapter_that_runs_is_best_even_where_there_is_no_more_room() -> None:
    assert score(engine("x y")) == 1.0


def test_room_for_one_more_is_second() -> None:
    assert score(engine("y")) == 0.8
    assert score(engine()) == 0.8
    assert score(engine("", "x")) == 0.8


def test_an_adapter_that_waits_for_room_is_third() -> None:
    assert score(engine("y z", "x")) == 0.6
    assert score(engine("y", "x")) == 0.6


def test_no_room_is_nothing() -> None:
    assert score(engine("y z")) == 0.0


def test_an_engine_that_reports_no_adapters_or_nothing_has_no_room() -> None:
    assert score(engine(most=None)) == 0.0
    assert score(candidate("a", reported=False)) == 0.0


def test_the_adapters_name_counts_before_the_models() -> None:
    assert score(engine("x"), model="m", lora_name="x") == 1.0
