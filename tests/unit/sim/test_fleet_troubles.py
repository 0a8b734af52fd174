"""Clients that go, requests that pass the router by, and engines that get slower: who is told, and what is counted."""

from __future__ import annotations

import msgspec
import pytest

from kvatlas.route.outcome import End
from kvatlas.sim.changes import EngineLeaves, EngineSlows
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.policies import RouterPolicy, Surroundings, make_policy
from kvatlas.sim.request import Request
from kvatlas.sim.workloads.workload import Arrival
from tests.models.workloads import COSTS, Given, arrival, run, tokens


class Ends:
    """A policy that writes down how it is told that requests ended."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.told: dict[int, End] = {}

    def __call__(self, surroundings: Surroundings) -> RouterPolicy:
        policy = make_policy(self._name, surroundings)
        assert isinstance(policy, RouterPolicy)
        ended = policy.ended

        def ending(request: Request, at_s: float, end: End) -> None:
            self.told[request.id] = end
            ended(request, at_s, end)

        policy.ended = ending  # type: ignore[method-assign]
        return policy


def but(arrival: Arrival, **fields: object) -> Arrival:
    return msgspec.structs.replace(arrival, **fields)


def test_who_has_no_token_in_time_gives_up_and_others_get_the_memory() -> None:
    """Of three requests of 600 tokens one fits into the engine at a time; the second one waits in vain."""
    spec = EngineSpec(costs=COSTS, gpu_blocks=70)
    waiting = [but(arrival(0.01 * at, tokens(at, 600), output=100), patience_s=0.5) for at in range(2)]
    last = arrival(0.02, tokens(2, 600), output=100)
    ends = Ends("kvatlas")
    result = run(Given([*waiting, last]), ends, specs=[spec])
    assert (result.arrived, result.finished, result.gave_up, result.cancelled) == (3, 2, 1, 0)
    assert list(ends.told.values()) == [End.CLIENT_GONE, End.DONE, End.DONE]
    assert result.ttft.count == 2
    assert "1 clients gave up before the first token" in result.notes


def test_an_answer_that_is_cancelled_ends_there_and_leaves_its_prefix_in_the_cache() -> None:
    prompt = tokens("prompt", 640)
    first = but(arrival(0.0, prompt, output=500), cancel_after_s=1.0)
    ends = Ends("kvatlas")
    result = run(Given([first, arrival(2.0, prompt, tokens("more", 50))]), ends, engines=1)
    assert (result.finished, result.gave_up, result.cancelled) == (1, 0, 1)
    assert list(ends.told.values()) == [End.CLIENT_GONE, End.DONE]
    assert (result.cached_tokens, result.prompt_tokens) == (640, 690)
    assert result.engines[0].busy < 0.6  # of 2 s: one of them, and the second prompt's


def test_clients_who_have_their_answer_do_not_go() -> None:
    arrivals = [arrival(0.1 * at, tokens(at, 50)) for at in range(5)]
    impatient = [but(one, patience_s=60.0, cancel_after_s=90.0) for one in arrivals]
    result = run(Given(impatient), "kvatlas")
    assert result == run(Given(arrivals), "kvatlas")
    assert (result.finished, result.notes) == (5, ())


def test_requests_past_the_router_load_their_engine_and_are_in_no_figure_of_users() -> None:
    """Reports tell of them, so that what the router sends goes elsewhere; with their tokens known by events it goes there."""
    foreign = [but(arrival(0.0, tokens(("foreign", at), 640), output=400), engine=1) for at in range(40)]
    ours = [arrival(1.0 + 0.2 * at, tokens(at, 640)) for at in range(20)]
    ends = Ends("llm-d-load")
    result = run(Given([*foreign, *ours]), ends, engines=2)
    assert (result.arrived, result.finished, result.foreign) == (20, 20, 40)
    assert [engine.requests for engine in result.engines] == [20, 0]
    assert result.engines[1].waiting_mean > 1
    assert (result.ttft.count, len(ends.told)) == (20, 20)
    shared = tokens(("foreign", 0), 640)
    result = run(Given([but(arrival(0.0, shared), engine=1), arrival(5.0, shared, tokens("more", 50))]), "llm-d-precise")
    assert ([engine.requests for engine in result.engines], result.cached_tokens) == ([0, 1, 0], 640)


def test_requests_past_the_router_are_lost_with_their_engine() -> None:
    foreign = [but(arrival(0.1 * at, tokens(at, 640), output=400), engine=1) for at in range(10)]
    result = run(Given([*foreign, arrival(5.0, tokens("ours", 50))]), changes=(EngineLeaves(0.55, 1),))
    assert (result.arrived, result.finished, result.foreign, result.refused) == (1, 1, 10, 0)
    assert "10 of these were lost: their engine left, was not there, or is too small" in result.notes


def test_an_engine_is_slower_from_one_time_to_another() -> None:
    workload = Given([arrival(float(at), tokens(at, 100), output=1) for at in range(6)])
    changes = (EngineSlows(1.5, 0, 4.0), EngineSlows(3.5, 0, 1.0))
    result = run(workload, engines=1, changes=changes)
    step_s = 0.01 + 100e-4
    assert [moment.ttft_mean_s for moment in result.moments] == pytest.approx(
        [step_s * factor for factor in (1, 1, 4, 4, 1, 1)]
    )


def test_an_engine_that_is_not_there_cannot_get_slower() -> None:
    with pytest.raises(ValueError, match=r"changes: engine 7 is not there at 1\.0 s"):
        run(Given([]), changes=(EngineSlows(1.0, 7, 2.0),))
