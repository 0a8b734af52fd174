"""Slots: what is taken for a limit, and what is not."""

from __future__ import annotations

import random

from kvatlas.route.load import EngineReport
from kvatlas.route.ttft.slots import STUCK_REPORTS, Slots


def say(slots: Slots, at: int, waiting: int, running: int) -> int | None:
    slots.learn(EngineReport(at_s=float(at), waiting=waiting, running=running))
    return slots.limit


def test_slots_are_what_runs_while_requests_wait_and_not_while_only_prompts_are_computed() -> None:
    slots = Slots()
    assert [say(slots, at, 3, 8 + at) for at in range(6)] == [None] * 6, "more run each time: no limit is seen"
    assert [say(slots, at, 3, 16) for at in range(10, 14)] == [None, None, None, 16]
    assert say(slots, 20, 0, 4) == 16
    assert say(slots, 21, 0, 17) is None, "more than it was thought to have"


def test_a_report_that_is_read_twice_says_nothing_new() -> None:
    slots = Slots()
    assert [say(slots, 1, 3, 8) for _ in range(9)] == [None] * 9


def test_fewer_than_were_seen_to_run_are_no_limit() -> None:
    """A long prompt is computed: others end meanwhile, none begins, and those behind it wait."""
    slots = Slots()
    say(slots, 1, 0, 5)
    assert [say(slots, 2 + at, 3, 1) for at in range(4 * STUCK_REPORTS)] == [None] * 4 * STUCK_REPORTS


def test_an_engine_without_a_limit_hardly_ever_seems_to_have_one() -> None:
    slots, rng = Slots(), random.Random(1)
    found = 0
    for at in range(4_000):
        running = 1 + sum(rng.random() < 0.3 for _ in range(5))
        found += say(slots, at, rng.randint(0, 4), running) is not None
    assert found < 40


def test_an_engine_that_came_back_with_fewer_slots_is_believed_after_a_while() -> None:
    slots = Slots()
    assert [say(slots, at, 3, 16) for at in range(6)][-1] == 16
    assert [say(slots, 10 + at, 3, 8) for at in range(400)][-1] == 8
