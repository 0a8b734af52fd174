"""Who gets a request that somebody could not take, and how often."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.cycle import Candidate
from kvatlas.route.decision import Decision, ProfileRun
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import Load
from kvatlas.route.request import RouteRequest
from kvatlas.serve.proxy.retries import BURST_MAX, RetryBudget, Tried, in_order
from kvatlas.types import PodId


def endpoint(name: str, port: int = 0) -> Endpoint:
    return Endpoint(name=EndpointName(name), address="10.0.0.1", port=port or 8000 + ord(name[0]), pod=PodId(name))


def decision(scores: dict[str, float], *targets: str, port: int = 0) -> Decision:
    candidates = tuple(Candidate(endpoint(name, port), Load()) for name in scores)
    picked = tuple(candidate for target in targets for candidate in candidates if candidate.name == target)
    run = ProfileRun(
        profile="main", candidates=candidates, dropped=(), ratings=(), totals=tuple(scores.values()), picked=picked
    )
    return Decision(
        request=RouteRequest(id="r", model="m"),
        at_s=0.0,
        targets=tuple(candidate.endpoint for candidate in picked),
        runs={"other": None, "main": run},
        matches={},
    )


def names(endpoints: list[Endpoint]) -> list[str]:
    return [one.name for one in endpoints]


def test_targets_come_first_then_the_others_by_their_scores() -> None:
    assert names(in_order(decision({"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.7}, "c", "a"))) == ["c", "a", "b", "d"]


def test_nobody_is_tried_twice_and_nobody_is_left_out() -> None:
    tried = Tried(decision({"a": 3, "b": 2, "c": 1}, "a"), lambda _: True)
    assert tried.first().name == "a"
    assert [one and one.name for one in (tried.next(unreachable=False) for _ in range(3))] == ["b", "c", None]
    assert tried.count == 3


def test_the_unhealthy_come_last() -> None:
    tried = Tried(decision({"a": 3, "b": 2, "c": 1}, "a"), lambda name: name == "c")
    assert tried.first().name == "c"
    assert [one and one.name for one in (tried.next(unreachable=False) for _ in range(3))] == ["a", "b", None]


def test_others_at_an_address_that_cannot_be_reached_are_not_tried() -> None:
    tried = Tried(decision({"a": 3, "b": 2}, "a", port=8000), lambda _: True)
    tried.first()
    assert tried.next(unreachable=True) is None


@given(st.floats(0, 1), st.lists(st.booleans(), max_size=200))
def test_retries_are_a_share_of_requests_and_a_few(share: float, asked: list[bool]) -> None:
    budget = RetryBudget(share)
    requests = granted = 0
    for retry in asked:
        if retry:
            granted += budget.take()
        else:
            budget.request()
            requests += 1
        assert granted <= BURST_MAX + share * requests + 1e-6
