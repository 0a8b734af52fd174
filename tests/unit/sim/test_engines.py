"""What a simulated engine does, situation by situation. The reference and the native engines are held to the same."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable

import pytest

from kvatlas.sim.choice import make_engines, why_no_native
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import Engines, EngineSpec, Happening, Job, Kind, TierSpec

CORES = ["reference"] + ["native"] * (why_no_native() is None)
COSTS = EngineCosts(step_s=1.0, prefill_token_s=0.0)
PREFILL = EngineCosts(step_s=0.5, prefill_token_s=0.01, prefill_context_s=0.0001, decode_request_s=0.2, decode_context_s=0.001)


@pytest.fixture(params=CORES)
def engines(request: pytest.FixtureRequest) -> Engines:
    return make_engines(request.param)


def spec(costs: EngineCosts = COSTS, **fields: object) -> EngineSpec:
    return EngineSpec(**{"costs": costs, "gpu_blocks": 11, "block_size_tokens": 4, **fields})  # type: ignore[arg-type]


def job(number: int, prompt: int, output: int = 1, keys: Callable[[int], int] | None = None) -> Job:
    """Return a job whose keys are its own, or as ``keys`` says by the number of the block."""
    key = keys or (lambda block: number * 1000 + block)
    return Job(number, array("Q", map(key, range((prompt + output) // 4))), prompt, output)


def shared(block: int) -> int:
    return block


def run(engines: Engines, until_s: float = math.inf) -> list[Happening]:
    """Go on until nothing happens any more."""
    told = []
    while True:
        now_s, new = engines.run(until_s)
        told += new
        if not new or now_s == until_s:
            return told


def lives(told: list[Happening]) -> list[tuple[float, str, int]]:
    """Return when what happened to which job, without blocks."""
    return [(each.at_s, each.kind.name, each.job) for each in told if each.kind not in {Kind.STORED, Kind.REMOVED}]


def test_a_prompt_longer_than_a_step_is_computed_in_chunks_and_decodes_go_first(engines: Engines) -> None:
    engine = engines.join(spec(step_tokens_max=8), 0.0)
    engines.add(engine, job(1, 4, output=4), 0.0)
    engines.add(engine, job(2, 17), 0.0)
    assert lives(run(engines)) == [
        (0.0, "SCHEDULED", 1),
        (0.0, "SCHEDULED", 2),  # 4 tokens of the first, 4 of the second; then 1 and 7, then 1 and 6
        (1.0, "FIRST_TOKEN", 1),
        (3.0, "FIRST_TOKEN", 2),
        (3.0, "FINISHED", 2),
        (4.0, "FINISHED", 1),
    ]


def test_a_steps_time_is_the_formulas(engines: Engines) -> None:
    engine = engines.join(spec(PREFILL), 0.0)
    engines.add(engine, job(1, 10, output=2), 0.0)
    told = {each.kind: each.at_s for each in run(engines)}
    first = 0.5 + 0.01 * 10 + 0.0001 * 50
    assert told[Kind.FIRST_TOKEN] == pytest.approx(first)
    assert told[Kind.FINISHED] == pytest.approx(first + 0.5 + 0.2 + 0.001 * 10)


def test_a_prefix_is_found_but_never_the_last_token(engines: Engines) -> None:
    """A prompt that is cached as a whole computes its last block again: two copies, each of which is told as it goes."""
    engine = engines.join(spec(), 0.0)
    engines.add(engine, job(1, 8, keys=shared), 0.0)
    run(engines)
    engines.add(engine, job(2, 8, keys=shared), 1.0)
    told = run(engines)
    assert [(each.first, each.many) for each in told if each.kind is Kind.SCHEDULED] == [(4, 0)]
    assert [(each.first, each.many) for each in told if each.kind is Kind.STORED] == [(1, 1)]
    assert engines.state(engine).cached_blocks == 3
    engines.add(engine, job(3, 40), 2.0)
    removed = [key for each in run(engines) if each.kind is Kind.REMOVED for key in each.keys]
    assert sorted(removed) == [0, 1, 1]


def test_the_last_job_gives_way_where_no_block_is_free_and_goes_on_through_the_cache(engines: Engines) -> None:
    engine = engines.join(spec(gpu_blocks=6), 0.0)
    engines.add(engine, job(1, 7, output=6), 0.0)
    engines.add(engine, job(2, 8, output=4), 0.0)
    told = lives(run(engines))
    preempted_s = next(at_s for at_s, kind, number in told if (kind, number) == ("PREEMPTED", 2))
    assert preempted_s > 1.0
    assert [kind for _, kind, number in told if number == 2] == ["SCHEDULED", "FIRST_TOKEN", "PREEMPTED", "FINISHED"]
    assert engines.state(engine).preemptions == 1
    assert engines.state(engine).blocks_used == 0


def test_a_job_longer_than_the_memory_is_refused(engines: Engines) -> None:
    """The last token of an answer needs no room, because nothing is computed behind it."""
    engine = engines.join(spec(), 0.0)
    engines.add(engine, job(1, 40, output=1), 0.0)
    engines.add(engine, job(2, 40, output=2), 0.0)
    kinds = {(each.kind, each.job) for each in run(engines)}
    assert {(Kind.FINISHED, 1), (Kind.REFUSED, 2)} <= kinds
    assert (Kind.REFUSED, 1) not in kinds


def test_no_more_jobs_run_than_may(engines: Engines) -> None:
    engine = engines.join(spec(running_max=1), 0.0)
    engines.add(engine, job(1, 4, output=2), 0.0)
    engines.add(engine, job(2, 4), 0.0)
    engines.run(0.5)
    assert (engines.state(engine).running, engines.state(engine).waiting) == (1, 1)
    assert (2.0, "SCHEDULED", 2) in lives(run(engines))


def test_metrics_are_those_of_the_last_step_that_ended(engines: Engines) -> None:
    """As vLLM's gauges: who comes while a step is under way is not in them before the next one ended."""
    engine = engines.join(spec(running_max=1), 0.0)

    def said() -> tuple[int, int]:
        metrics = engines.metrics(engine)
        return metrics.running, metrics.waiting

    engines.add(engine, job(1, 4, output=4), 0.0)
    engines.run(0.5)
    assert said() == (1, 0)  # it never ended a step: what is so now
    engines.run(1.5)
    engines.add(engine, job(2, 4), 1.5)
    engines.run(2.5)
    assert said() == (1, 0)
    assert engines.state(engine).waiting == 1
    engines.run(3.5)
    assert said() == (1, 1)
    run(engines)
    assert said() == (0, 0)


def test_blocks_come_back_from_a_tier_before_the_prompt_is_computed(engines: Engines) -> None:
    """While they are loaded, others run. Loads are done one after the other."""
    tier = TierSpec(name="cpu", blocks=100, load_block_s=0.75, latency_s=0.25)
    engine = engines.join(spec(tiers=(tier,)), 0.0)
    engines.add(engine, job(1, 9, keys=shared), 0.0)
    engines.run(1.0)
    engines.add(engine, job(2, 40), 1.0)
    engines.run(2.0)
    engines.add(engine, job(3, 9, keys=shared), 2.0)
    engines.add(engine, job(4, 4), 2.0)
    told = run(engines)
    assert [(each.at_s, each.job, each.first, each.many) for each in told if each.kind is Kind.SCHEDULED] == [
        (2.0, 4, 0, 0),
        (3.75, 3, 0, 8),
    ]
    stored = [(each.at_s, each.job, each.first, each.many, each.tier) for each in told if each.kind is Kind.STORED]
    assert stored == [(2.0, 4, 0, 1, 0), (2.0, 4, 0, 1, 1), (3.75, 3, 0, 2, 0)]


def test_a_job_that_comes_while_a_step_ends_takes_part_in_the_next(engines: Engines) -> None:
    engine = engines.join(spec(), 0.0)
    engines.add(engine, job(1, 4, output=3), 0.0)
    now_s, _ = engines.run(1.0)
    engines.add(engine, job(2, 4), now_s)
    assert (1.0, "SCHEDULED", 2) in lives(run(engines))


def test_a_run_stops_when_a_job_finishes(engines: Engines) -> None:
    first, second = engines.join(spec(), 0.0), engines.join(spec(EngineCosts(step_s=0.7, prefill_token_s=0.0)), 0.0)
    engines.add(first, job(1, 4), 0.0)
    engines.add(second, job(2, 4, output=2), 0.0)
    assert [engines.run(5.0)[0] for _ in range(3)] == [1.0, 1.4, 5.0]


def test_an_aborted_job_frees_its_blocks_and_says_no_more(engines: Engines) -> None:
    engine = engines.join(spec(), 0.0)
    engines.add(engine, job(1, 8, output=5), 0.0)
    engines.run(1.5)
    assert engines.abort(engine, 1, 1.5)
    assert not engines.abort(engine, 1, 1.5)
    assert engines.state(engine).blocks_used == 0
    assert run(engines) == []


def test_a_slower_engine_takes_longer_from_its_next_step_on(engines: Engines) -> None:
    engine = engines.join(spec(), 0.0)
    engines.add(engine, job(1, 4, output=4), 0.0)
    engines.run(0.5)
    engines.slow(engine, 3.0, 0.5)
    told = [happening for at_s in (1.5, 4.5) for happening in engines.run(at_s)[1]]
    assert [(each.at_s, each.kind.name) for each in told if each.kind is Kind.FIRST_TOKEN] == [(1.0, "FIRST_TOKEN")]
    assert engines.state(engine).step_ends_s == 7.0
    engines.slow(engine, 1.0, 4.5)
    assert [(each.at_s, each.kind.name) for each in run(engines)] == [(8.0, "FINISHED")]
    assert engines.state(engine).busy_s == 8.0


def test_an_engine_that_leaves_gives_its_jobs_back(engines: Engines) -> None:
    engine = engines.join(spec(running_max=1), 0.0)
    for number in (1, 2, 3):
        engines.add(engine, job(number, 8, output=5), 0.0)
    engines.add(engine, job(4, 400), 0.0)
    engines.run(0.5)
    engines.add(engine, job(5, 400), 0.5)
    assert engines.leave(engine, 0.5) == [1, 2, 3, 5]
    with pytest.raises(ValueError, match=r"engine 0: there is none of this number"):
        engines.state(engine)
    assert engines.join(spec(), 0.5) == 1


def test_the_cache_is_reset_only_while_no_job_runs(engines: Engines) -> None:
    engine = engines.join(spec(), 0.0)
    engines.add(engine, job(1, 8, output=3, keys=shared), 0.0)
    engines.run(0.5)
    assert not engines.reset_cache(engine, 0.5)
    run(engines)
    assert engines.reset_cache(engine, 3.0)
    assert engines.state(engine).cached_blocks == 0
    engines.add(engine, job(2, 8, keys=shared), 3.0)
    assert [each.first for each in run(engines) if each.kind is Kind.SCHEDULED] == [0]


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (lambda engines: engines.join(spec(gpu_blocks=1), 0.0), "gpu_blocks: expected 2 to 2147483647, got 1"),
        (
            lambda engines: engines.join(spec(block_size_tokens=1 << 17), 0.0),
            "block_size_tokens: expected 1 to 65536, got 131072",
        ),
        (
            lambda engines: engines.join(spec(EngineCosts(step_s=-1.0, prefill_token_s=0.0)), 0.0),
            r"costs.step_s: expected seconds, 0 or more, got -1",
        ),
        (lambda engines: engines.add(0, job(9, 0), 2.0), "job 9: prompt_tokens and output_tokens: expected 1 to"),
        (
            lambda engines: engines.add(0, Job(9, array("Q"), 8, 1), 2.0),
            "job 9: keys: expected 2 or more of blocks of 4, got 0",
        ),
        (
            lambda engines: engines.add(0, Job(9, array("I"), 1, 1), 2.0),
            r"job 9: keys: expected array\('Q'\), got array\('I'\)",
        ),
        (lambda engines: engines.add(0, job(1, 8), 2.0), "job 1: engine 0 has a job of this id"),
        (lambda engines: engines.add(0, job(9, 8), 1.0), "at_s: expected 2.0 .* or later, got 1.0"),
        (lambda engines: engines.add(0, job(9, 8), math.inf), "at_s: expected 2.0 .* or later, got inf"),
        (lambda engines: engines.add(0, job(9, 8), 9.0), "at_s: engines have work before 9.0; run up to it first"),
        (lambda engines: engines.add(7, job(9, 8), 2.0), "engine 7: there is none of this number"),
        (lambda engines: engines.slow(0, 0.0, 2.0), "factor: expected more than 0, at most 1e[+]06, got 0.0"),
        (lambda engines: engines.slow(0, math.nan, 2.0), "factor: expected more than 0, .*, got nan"),
        (lambda engines: engines.slow(7, 2.0, 2.0), "engine 7: there is none of this number"),
        (lambda engines: engines.slow(0, 2.0, 1.0), "at_s: expected 2.0 .* or later, got 1.0"),
        (lambda engines: engines.run(1.0), "until_s: expected 2.0 .* or later, got 1.0"),
        (lambda engines: engines.run(math.nan), "until_s: expected 2.0 .* or later, got (?i:nan)"),
    ],
)
def test_what_makes_no_sense_is_refused(engines: Engines, asked: Callable[[Engines], object], problem: str) -> None:
    engine = engines.join(spec(), 0.0)
    engines.run(1.5)
    engines.add(engine, job(1, 8, output=9), 1.5)
    engines.run(2.0)
    before = engines.state(engine)
    with pytest.raises(ValueError, match=problem):
        asked(engines)
    assert engines.state(engine) == before
