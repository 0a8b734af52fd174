"""What goes wrong with an embedded engine: which fault a request gets, and how a command line names one."""

from __future__ import annotations

import pytest

from kvatlas.errors import ConfigError
from kvatlas.sim.live.faults import Fault, Faults, read_fault


def test_nothing_goes_wrong_by_default() -> None:
    faults = Faults()
    assert (faults.of_request(), faults.of_events()) == (None, None)


def test_a_share_of_requests_gets_a_fault_and_the_others_the_next_one_that_is_drawn() -> None:
    drawn = iter((0.05, 0.5, 0.05, 0.5, 0.5))
    rare, rarer = Fault("cut", share=0.1), Fault("hang", share=0.1)
    faults = Faults((rare, rarer), lambda: next(drawn))
    assert [faults.of_request() for _ in range(3)] == [rare, rarer, None]


def test_a_fault_that_is_to_come_so_often_is_over_then() -> None:
    faults = Faults((Fault("reset", times=2), Fault("status")))
    assert [one.kind for _ in range(4) if (one := faults.of_request())] == ["reset", "reset", "status", "status"]
    assert faults.listed == (Fault("status"),)


def test_lost_events_are_no_requests_fault() -> None:
    faults = Faults((Fault("lose-events", times=1),))
    assert faults.of_request() is None
    assert faults.of_events() is not None
    assert faults.of_events() is None


def test_who_waits_for_other_faults_is_told_also_of_those_set_before_he_waited() -> None:
    faults = Faults((Fault("stall"),))
    over = faults.over
    faults.set()
    assert over.is_set()
    assert not faults.over.is_set()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("503", Fault("status")),
        ("429:0.25", Fault("status", status=429, share=0.25)),
        ("cut", Fault("cut")),
        ("lose-events:0.01", Fault("lose-events", share=0.01)),
    ],
)
def test_a_command_line_names_a_status_or_a_kind_and_a_share(text: str, fault: Fault) -> None:
    assert read_fault(text) == fault


@pytest.mark.parametrize("text", ["", "explode", "200", "503:0", "cut:2", "cut:often", "cut:"])
def test_what_is_no_fault_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--fault.*lose-events"):
        read_fault(text)
