"""What a calibration sends. No IO."""

from __future__ import annotations

import random

import msgspec

from kvatlas.errors import RequestError

FIRST_TOKEN, LAST_TOKEN = 200, 3_000
"""Random token ids: every vocabulary has them, and few of its special ones."""
OUTPUT_TOKENS = 48
"""Of each request that is measured while it gets its answer."""


class Batch(msgspec.Struct, frozen=True):
    """Requests that get their answers at the same time."""

    requests: int
    prompt_tokens: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """In the order of sending."""

    prompts: tuple[int, ...]
    """Lengths of prompts that are sent alone, for their first token."""
    repeats: int
    batches: tuple[Batch, ...]

    @property
    def requests(self) -> int:
        """How many there are, with one to begin with that is not measured."""
        return 1 + len(self.prompts) * self.repeats + sum(batch.requests for batch in self.batches)

    @property
    def prompt_tokens(self) -> int:
        alone = sum(self.prompts) * self.repeats
        return min(self.prompts) + alone + sum(batch.requests * batch.prompt_tokens for batch in self.batches)

    @property
    def output_tokens(self) -> int:
        return 1 + len(self.prompts) * self.repeats + OUTPUT_TOKENS * sum(batch.requests for batch in self.batches)


def make_plan(prompt_tokens_max: int, batch_max: int, repeats: int, cache_tokens: int | None) -> Plan:
    """Return what to send. ``cache_tokens``: what the engine's KV cache holds: batches that do not fit are left out."""
    if prompt_tokens_max < 256:
        raise RequestError("--prompt-tokens", f"{prompt_tokens_max} is too short", "256 or more")
    lengths = [64]
    while lengths[-1] * 2 <= prompt_tokens_max:
        lengths.append(lengths[-1] * 2)
    sizes = [1]
    while sizes[-1] * 2 <= batch_max:
        sizes.append(sizes[-1] * 2)
    contexts = (64, max(256, lengths[-1] // 4))
    batches = [Batch(size, context) for context in contexts for size in sizes]
    room = float("inf") if cache_tokens is None else 0.9 * cache_tokens
    fitting = [one for one in batches if one.requests * (one.prompt_tokens + OUTPUT_TOKENS) <= room]
    return Plan(prompts=tuple(lengths), repeats=repeats, batches=tuple(fitting))


class Prompts:
    """Prompts that share no block with each other."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  not for secrets

    def next(self, tokens: int) -> list[int]:
        return [self._random.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(tokens)]
