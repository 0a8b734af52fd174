"""A fleet loses no request and no time, says the same again, and knows as much as its policy can know."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvatlas.route.outcome import End
from kvatlas.sim.changes import EngineJoins, EngineLeaves
from kvatlas.sim.engines import EngineSpec, EngineState
from kvatlas.sim.events import EventPath
from kvatlas.sim.fleet import simulate
from kvatlas.sim.policies import POLICIES, RouterPolicy, Surroundings, make_policy
from kvatlas.sim.reference import ReferenceEngines
from kvatlas.sim.request import Request
from kvatlas.sim.tally import MOMENTS_MAX
from kvatlas.sim.workloads.workload import Arrival
from tests.models.workloads import COSTS, SMALL, Given, arrival, run, shared_prefixes, tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_everybody_and_does_it_again(policy: str) -> None:
    workload = shared_prefixes(3, requests=40, per_s=20.0)
    path = EventPath(lag_s=0.01, jitter_s=0.05, loss=0.05)
    results = [run(workload, policy, path=path) for _ in range(2)]
    assert results[0] == results[1]
    result = results[0]
    assert result.policy == policy
    assert (result.arrived, result.finished, result.refused) == (40, 40, 0)
    assert sum(engine.requests for engine in result.engines) == 40
    assert result.prompt_tokens == 40 * (640 + 96)
    assert result.output_tokens == 40 * 12
    assert 0 <= result.cached_tokens < result.prompt_tokens
    assert sum(moment.finished for moment in result.moments) == 40


def test_another_seed_decides_otherwise() -> None:
    workload = shared_prefixes(3, requests=40, per_s=20.0)
    assert run(workload, "random", seed=1) != run(workload, "random", seed=2)


def test_results_do_not_depend_on_the_process() -> None:
    script = (
        "import msgspec\nfrom tests.unit.sim.test_fleet import *\n"
        "result = run(shared_prefixes(3, requests=25, per_s=20.0), 'kvatlas', path=EventPath(lag_s=0.02, loss=0.1))\n"
        "print(msgspec.json.encode(result).decode())"
    )
    root = Path(__file__).parents[3]
    told = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": f"{root / 'src'}:{root}"},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] != ""


def test_one_request_takes_the_time_of_its_steps() -> None:
    """100 prompt tokens in one step, then 4 steps of one token each."""
    result = run(Given([arrival(2.0, tokens("a", 100), output=5)]), engines=1)
    prefill_s, decode_s = 0.01 + 100e-4, 0.01 + 1e-4
    assert result.ttft.max == pytest.approx(prefill_s)
    assert result.tpot.max == pytest.approx(decode_s)
    assert result.e2e.max == pytest.approx(prefill_s + 4 * decode_s)
    assert result.duration_s == pytest.approx(prefill_s + 4 * decode_s)
    assert result.queue.max == 0.0
    assert result.ttft.p50 == pytest.approx(prefill_s, rel=0.01)


def test_a_user_goes_on_after_the_answer() -> None:
    """A chat whose every turn repeats all before it finds it in the cache, but for the last token, which was only said."""
    answered_s: list[float] = []

    def after(answered: Arrival, at_s: float) -> Arrival | None:
        answered_s.append(at_s)
        if len(answered_s) == 5:
            return None
        prompt = answered.tokens + tokens(len(answered_s), 40)
        return Arrival(at_s + 1.0, prompt + tokens((len(answered_s), "answer"), 16), len(prompt), answered.session)

    result = run(Given([arrival(0.0, tokens("a", 160), output=16, session=7)], after), engines=1)
    assert (result.arrived, result.finished) == (5, 5)
    assert all(later - earlier > 1.0 for earlier, later in itertools.pairwise(answered_s))
    assert result.cached_tokens == sum((160 + 56 * turn - 40 - 1) // 16 * 16 for turn in range(1, 5))


def test_whoever_comes_too_late_does_not_come() -> None:
    workload = Given([arrival(float(at), tokens(at, 50)) for at in range(10)])
    result = run(workload, arrivals_until_s=4.5)
    assert (result.arrived, result.finished) == (5, 5)


def test_a_run_can_be_cut_off() -> None:
    workload = Given([arrival(0.0, tokens(at, 50), output=500) for at in range(10)])
    result = run(workload, ends_s=1.0)
    assert (result.arrived, result.finished) == (10, 0)
    assert "10 requests were not answered when the run ended" in result.notes


@pytest.mark.parametrize("policy", POLICIES)
def test_an_engine_that_leaves_loses_no_request(policy: str) -> None:
    workload = shared_prefixes(5, requests=50, per_s=40.0, output=20)
    changes = (EngineLeaves(0.5, 0), EngineJoins(0.6, SMALL), EngineLeaves(0.9, 2))
    result = run(workload, policy, changes=changes, path=EventPath(lag_s=0.01))
    assert (result.arrived, result.finished, result.refused) == (50, 50, 0)
    assert [engine.name for engine in result.engines] == ["engine-0", "engine-1", "engine-2", "engine-3"]
    assert result.engines[3].requests > 0
    assert any(note.endswith("requests were sent again: their engine left") for note in result.notes)


def test_without_any_engine_requests_are_refused_and_counted() -> None:
    workload = Given([arrival(float(at), tokens(at, 50), output=50) for at in range(4)])
    result = run(workload, engines=1, changes=(EngineLeaves(2.1, 0),))
    assert (result.arrived, result.finished, result.refused) == (4, 2, 2)
    assert "2 requests were refused: no engine was there" in result.notes


def test_what_fits_nowhere_is_refused_and_what_fits_somewhere_is_not() -> None:
    specs = [SMALL, EngineSpec(costs=COSTS, gpu_blocks=300)]
    prompts = [arrival(0.1 * at, tokens(at, size * 16)) for at, size in enumerate((500, 500, 1_200, 20))]
    for policy in ("round-robin", "kvatlas"):
        result = run(Given(prompts), policy, specs=specs)
        assert (result.arrived, result.finished, result.refused) == (4, 3, 1)


def test_whoever_comes_while_as_many_as_may_be_are_in_flight_is_refused_and_told() -> None:
    result = run(Given([arrival(at_s, tokens(at_s, 64)) for at_s in (0.0, 0.001, 0.002, 60.0)]), in_flight_max=2)
    assert (result.arrived, result.finished, result.refused) == (4, 3, 1)
    assert result.notes == ("1 requests were refused: as many as may be were in flight",)


def test_engines_may_have_blocks_of_different_sizes() -> None:
    specs = [SMALL, EngineSpec(costs=COSTS, gpu_blocks=250, block_size_tokens=64)]
    result = run(shared_prefixes(2, requests=40, per_s=10.0), "kvatlas", specs=specs)
    assert result.finished == 40
    assert all(engine.requests for engine in result.engines)
    assert result.hit_ratio > 0.5


class Predictions:
    """A policy that writes down what it predicts at each decision, and what its engine had of the prompt then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.pairs: list[tuple[int, int]] = []

    def __call__(self, surroundings: Surroundings) -> RouterPolicy:
        policy = make_policy(self._name, surroundings)
        assert isinstance(policy, RouterPolicy)
        predicted: dict[int, int] = {}
        choose, ended = policy.choose, policy.ended

        def choosing(request: Request) -> int:
            engine = choose(request)
            predicted[request.id] = policy.predicted_cached_tokens(request) or 0
            return engine

        def ending(request: Request, at_s: float, end: End) -> None:
            self.pairs.append((predicted.pop(request.id), request.cached_tokens))
            ended(request, at_s, end)

        policy.choose, policy.ended = choosing, ending  # type: ignore[method-assign]
        return policy

    @property
    def wrong(self) -> int:
        return sum(abs(predicted - cached) for predicted, cached in self.pairs)


def one_by_one(seed: int, requests: int, output: int = 30) -> Given:
    """Prompts with shared beginnings, so far apart that each is answered before the next; caches are too small for all."""
    rng = random.Random(seed)
    prefixes = [tokens(f"{seed} prefix {group}", rng.randrange(16, 900)) for group in range(8)]
    sizes = (rng.randrange(1, 300) for _ in range(requests))
    made = [arrival(5.0 * at, rng.choice(prefixes), tokens((seed, at), size), output=output) for at, size in enumerate(sizes)]
    return Given(made)


@pytest.mark.parametrize("policy", ["llm-d-precise", "kvatlas"])
def test_precise_predictions_are_what_engines_have(policy: str) -> None:
    predictions = Predictions(policy)
    spec = EngineSpec(costs=COSTS, gpu_blocks=150)
    result = run(one_by_one(1, 120), predictions, specs=[spec] * 2)
    assert len(predictions.pairs) == 120
    assert predictions.wrong == 0
    assert result.cached_tokens > 10_000


def test_lag_and_loss_make_predictions_worse_and_are_told() -> None:
    wrong, notes = [], []
    for path in (EventPath(), EventPath(lag_s=12.0), EventPath(loss=0.3, replay_after_s=None)):
        predictions = Predictions("llm-d-precise")
        result = run(one_by_one(1, 80), predictions, specs=[EngineSpec(costs=COSTS, gpu_blocks=150)] * 2, path=path)
        assert result.finished == 80
        wrong.append(predictions.wrong)
        notes.append(" ".join(result.notes))
    assert wrong[0] == 0
    assert wrong[1] > 1_000
    assert wrong[2] > 1_000
    assert notes[:2] == ["", ""]
    assert "frames of events were lost" in notes[2]
    assert "decisions were made while a stream was stale" in notes[2]
    assert "2 streams were stale at the end" in notes[2]


def test_a_replay_heals_what_was_lost() -> None:
    predictions = Predictions("llm-d-precise")
    path = EventPath(loss=0.3, replay_after_s=0.05)
    result = run(one_by_one(1, 80), predictions, path=path)
    assert "gaps were found in streams of events" in " ".join(result.notes)
    assert sum(predicted != cached for predicted, cached in predictions.pairs) < 20  # only frames that nothing followed


def test_engines_are_polled_as_often_as_asked() -> None:
    reports: list[float] = []

    def watched(surroundings: Surroundings) -> RouterPolicy:
        policy = make_policy("llm-d-load", surroundings)
        assert isinstance(policy, RouterPolicy)
        noted = policy.reports

        def reporting(states: Mapping[int, EngineState], at_s: float) -> None:
            reports.append(at_s)
            noted(states, at_s)

        policy.reports = reporting  # type: ignore[method-assign]
        return policy

    workload = shared_prefixes(2, requests=40, per_s=20.0)
    run(workload, watched, engines=1, report_every_s=0.1)
    assert all(later - earlier > 0.099 for earlier, later in itertools.pairwise(reports))
    assert len(reports) > 10
    reports.clear()
    run(workload, watched, engines=1, report_every_s=math.inf)
    assert not reports


def test_moments_are_few_and_equally_long() -> None:
    workload = Given([arrival(7.0 * at, tokens(at, 20), output=2) for at in range(200)])
    result = run(workload, engines=1)
    starts = [moment.from_s for moment in result.moments]
    assert MOMENTS_MAX / 2 <= len(starts) <= MOMENTS_MAX
    assert {round(later - earlier, 6) for earlier, later in itertools.pairwise(starts)} == {starts[1]}
    assert sum(moment.arrived for moment in result.moments) == 200
    assert sum(moment.output_tokens for moment in result.moments) == 400


def test_progress_is_told() -> None:
    told: list[tuple[float, int, int]] = []
    workload = Given([arrival(0.01 * at, tokens(0, 20), output=1) for at in range(1_100)])
    run(workload, progress=lambda *now: told.append(now))
    assert [arrived for _, arrived, _ in told] == [1_024]


def test_engines_of_another_run_are_refused() -> None:
    engines = ReferenceEngines()
    simulate(Given([]), "random", [SMALL], seed=1, engines=engines)
    with pytest.raises(ValueError, match="make new ones for each run"):
        simulate(Given([]), "random", [SMALL], seed=1, engines=engines)


def test_an_engine_cannot_leave_twice() -> None:
    with pytest.raises(ValueError, match="engine 0 is not there"):
        run(Given([]), changes=(EngineLeaves(1.0, 0), EngineLeaves(2.0, 0)))
