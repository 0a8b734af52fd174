"""From times to costs, and from costs to a file and back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvatlas.errors import ConfigError, RequestError
from kvatlas.sim.calibrate.endpoint import Answered
from kvatlas.sim.calibrate.fit import PromptTime, StepTime, fit, least_squares
from kvatlas.sim.calibrate.measure import step_time
from kvatlas.sim.calibrate.plan import OUTPUT_TOKENS, Batch, Prompts, make_plan
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec, TierSpec
from kvatlas.sim.spec_file import read_spec, spec_of, spec_text

COSTS = EngineCosts(
    step_s=0.008, prefill_token_s=0.0003, prefill_context_s=2e-8, decode_request_s=0.0004, decode_context_s=1e-7
)
REQUEST_S = 0.003
STEP_TOKENS = 2048
SPEC = EngineSpec(costs=COSTS, gpu_blocks=1000, tiers=(TierSpec(name="cpu", blocks=5000, load_block_s=0.0001),))


def prompt_time(tokens: int, factor: float = 1.0) -> PromptTime:
    steps = -(-tokens // STEP_TOKENS)
    seconds = steps * COSTS.step_s + tokens * COSTS.prefill_token_s + tokens**2 / 2 * COSTS.prefill_context_s
    return PromptTime(tokens, (REQUEST_S + seconds) * factor)


def measured_step(requests: int, context: int, factor: float = 1.0) -> StepTime:
    total = requests * context
    seconds = COSTS.step_s + requests * COSTS.decode_request_s + total * COSTS.decode_context_s
    return StepTime(requests, total, seconds * factor)


LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = [(requests, context) for requests in (1, 2, 4, 8, 16, 32) for context in (64, 2048)]


def test_exact_times_lead_back_to_the_costs() -> None:
    found = fit([prompt_time(length) for length in LENGTHS], [measured_step(*batch) for batch in BATCHES], STEP_TOKENS)
    for name in COSTS.__struct_fields__:
        assert getattr(found.costs, name) == pytest.approx(getattr(COSTS, name), rel=1e-6), name
    assert found.request_s == pytest.approx(REQUEST_S, rel=1e-6)
    assert found.error_max < 1e-6
    assert found.unknown == ()


def test_times_that_are_off_by_a_few_percent_lead_near_the_costs() -> None:
    generator = random.Random(3)
    prompts = [prompt_time(length, generator.gauss(1, 0.02)) for length in LENGTHS for _ in range(5)]
    steps = [measured_step(*batch, generator.gauss(1, 0.02)) for batch in BATCHES for _ in range(5)]
    found = fit(prompts, steps, STEP_TOKENS)
    for name in ("step_s", "prefill_token_s", "decode_request_s"):
        assert getattr(found.costs, name) == pytest.approx(getattr(COSTS, name), rel=0.1), name
    for name in ("prefill_context_s", "decode_context_s"):
        assert getattr(found.costs, name) == pytest.approx(getattr(COSTS, name), rel=0.3), name
    assert found.error_mean < 0.03


def test_a_cost_that_times_do_not_show_is_zero_and_named() -> None:
    steps = [StepTime(requests, requests * 100.0, 0.01) for requests in (1, 2, 4)]
    prompts = [PromptTime(tokens, 0.01 + tokens * 1e-4) for tokens in (64, 128, 256)]
    found = fit(prompts, steps, STEP_TOKENS)
    assert {"prefill_context_s", "decode_request_s", "decode_context_s"} <= set(found.unknown)
    assert found.costs.step_s == pytest.approx(0.01)
    assert found.costs.prefill_token_s == pytest.approx(1e-4)


def test_no_cost_is_below_zero_whatever_the_times() -> None:
    generator = random.Random(5)
    for _ in range(20):
        prompts = [PromptTime(length, generator.uniform(0.001, 1)) for length in LENGTHS]
        steps = [StepTime(requests, requests * 10.0, generator.uniform(0.001, 1)) for requests in (1, 2, 4)]
        found = fit(prompts, steps, STEP_TOKENS)
        assert min(*(getattr(found.costs, name) for name in COSTS.__struct_fields__), found.request_s) >= 0


def test_nothing_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="are needed"):
        fit([], [measured_step(1, 64)], STEP_TOKENS)


def test_least_squares_is_no_worse_than_any_point_around_it() -> None:
    generator = random.Random(7)
    rows = [[generator.uniform(0, 1) for _ in range(3)] for _ in range(10)]
    values = [generator.uniform(-1, 2) for _ in range(10)]

    def apart(x: list[float]) -> float:
        return sum((sum(a * b for a, b in zip(row, x, strict=True)) - v) ** 2 for row, v in zip(rows, values, strict=True))

    found = least_squares(rows, values)
    for _ in range(500):
        other = [max(0.0, value + generator.gauss(0, 0.1)) for value in found]
        assert apart(found) <= apart(other) + 1e-12


# -- what is measured ---------------------------------------------------------------------------------------------------


def answered(first_s: float, step_s: float, tokens: int) -> Answered:
    return Answered(0.0, tuple(first_s + step_s * number for number in range(tokens)), 64, 0)


def test_a_steps_time_is_taken_while_all_requests_of_a_batch_get_tokens() -> None:
    slow_start = answered(0.0, 0.5, 4)
    steady = tuple(slow_start.token_s[-1] + 0.01 * number for number in range(1, 41))
    one = Answered(0.0, (*slow_start.token_s, *steady), 64, 0)
    step = step_time(Batch(2, 64), [one, answered(1.5, 0.01, 41)])
    assert step is not None
    assert step.step_s == pytest.approx(0.01)
    assert step.requests == 2


def test_requests_that_were_not_answered_at_the_same_time_are_not_counted() -> None:
    assert step_time(Batch(2, 64), [answered(0.0, 0.01, 20), answered(5.0, 0.01, 20)]) is None


def test_a_plan_says_what_it_will_send() -> None:
    plan = make_plan(1024, 4, 2, None)
    assert plan.prompts == (64, 128, 256, 512, 1024)
    assert {batch.requests for batch in plan.batches} == {1, 2, 4}
    assert plan.requests == 1 + 5 * 2 + 2 * (1 + 2 + 4)
    assert plan.output_tokens == 11 + 14 * OUTPUT_TOKENS


def test_batches_that_do_not_fit_into_the_cache_are_left_out() -> None:
    plan = make_plan(1024, 64, 1, 4000)
    assert all(batch.requests * (batch.prompt_tokens + OUTPUT_TOKENS) <= 4000 for batch in plan.batches)
    assert max(batch.requests for batch in plan.batches) < 64


def test_a_model_that_takes_no_prompts_worth_measuring_is_refused() -> None:
    with pytest.raises(RequestError, match="--prompt-tokens"):
        make_plan(100, 4, 1, None)


def test_prompts_share_no_beginning() -> None:
    prompts = Prompts(1)
    assert len({tuple(prompts.next(16)) for _ in range(200)}) == 200
    assert Prompts(2).next(16) == Prompts(2).next(16)


# -- as a file ----------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_written_is_the_one_that_is_read(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(spec_text(SPEC, ["measured", "with care"]))
    assert file.read_text().startswith("# measured\n# with care\ncosts:\n")
    assert read_spec(file) == SPEC


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "engine.yaml: is no mapping"),
        ("gpu_blocks: 10", "costs: is missing"),
        ("{gpu_blocks: 10, costs: {step_s: 1}}", "costs.prefill_token_s: is missing"),
        ("{gpu_blocks: 10, costs: {step_s: 1, prefill_token_s: 1, speed: 2}}", "costs.speed"),
        ("{gpu_blocks: 10, costs: {step_s: -1, prefill_token_s: 1}}", "costs.step_s: is -1"),
        ("{gpu_blocks: 10, costs: {step_s: .nan, prefill_token_s: 1}}", "costs.step_s"),
        ("{gpu_blocks: 1, costs: {step_s: 1, prefill_token_s: 1}}", "gpu_blocks: is 1"),
        ("{gpu_blocks: many, costs: {step_s: 1, prefill_token_s: 1}}", "gpu_blocks"),
        ("{gpu_blocks: 9, gpu_blocks: 10}", "is no YAML"),
    ],
)
def test_what_is_no_engine_is_refused_with_the_field(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        spec_of(text, "engine.yaml")
    assert says in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        read_spec(tmp_path / "nothing.yaml")
