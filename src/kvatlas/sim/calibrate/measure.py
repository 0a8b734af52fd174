"""Carries out a plan: prompts alone, then batches."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence

import msgspec

from kvatlas.sim.calibrate.endpoint import Answered, Endpoint
from kvatlas.sim.calibrate.fit import PromptTime, StepTime
from kvatlas.sim.calibrate.plan import OUTPUT_TOKENS, Batch, Plan, Prompts

TOKENS_MIN = 8
"""A batch of which fewer tokens came while all its requests got theirs is not counted."""


class Measured(msgspec.Struct, frozen=True):
    """What a plan showed."""

    prompts: tuple[PromptTime, ...]
    steps: tuple[StepTime, ...]
    notes: tuple[str, ...]
    """What was left out, and why."""


async def measure(endpoint: Endpoint, model: str, plan: Plan, seed: int, sent: Callable[[int], None]) -> Measured:
    """Send what the plan says. ``sent``: told how many requests were answered, as they are. Raises RequestError."""
    prompts = Prompts(seed)
    notes: list[str] = []

    async def ask(prompt_tokens: int, output_tokens: int) -> Answered:
        answered = await endpoint.generate(model, prompts.next(prompt_tokens), output_tokens)
        sent(1)
        return answered

    await ask(min(plan.prompts), 1)
    alone = []
    for length in plan.prompts:
        answers = [await ask(length, 1) for _ in range(plan.repeats)]
        if any(answer.cached_tokens for answer in answers):
            notes.append(f"prompts of {length} tokens were partly cached: its times are too short")
        told = answers[0].prompt_tokens or length
        if told != length:
            notes.append(f"the engine counts {told} tokens where {length} were sent")
        alone.append(PromptTime(told, statistics.median(answer.ttft_s for answer in answers)))
    steps = []
    for batch in plan.batches:
        answers = await asyncio.gather(*(ask(batch.prompt_tokens, OUTPUT_TOKENS) for _ in range(batch.requests)))
        step = step_time(batch, answers)
        if step is None:
            notes.append(f"{batch.requests} x {batch.prompt_tokens} tokens: they were hardly answered at the same time")
        else:
            steps.append(step)
    return Measured(tuple(alone), tuple(steps), tuple(notes))


def step_time(batch: Batch, answers: Sequence[Answered]) -> StepTime | None:
    """Return the time of a step, from when the last request got its first token to when the first one got its last.

    None where too few tokens came in that time.
    """
    begin_s = max(answer.token_s[0] for answer in answers)
    end_s = min(answer.token_s[-1] for answer in answers)
    gaps, contexts = [], []
    for answer in answers:
        within = [at for at, time_s in enumerate(answer.token_s) if begin_s <= time_s <= end_s]
        if len(within) <= TOKENS_MIN:
            return None
        first, last = within[0], within[-1]
        gaps.append((answer.token_s[last] - answer.token_s[first]) / (last - first))
        contexts.append(batch.prompt_tokens + (first + last + 1) / 2)
    return StepTime(batch.requests, sum(contexts), statistics.median(gaps))
