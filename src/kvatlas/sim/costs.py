"""How long one step of an engine takes."""

from __future__ import annotations

import msgspec


class EngineCosts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one step of an engine, as a sum; all of them 0 or more.

    A step computes a chunk of some prompts and one token of each request that is being answered:

        step_s
        + prefill_token_s * (prompt tokens computed)
        + prefill_context_s * (for each chunk of n tokens behind c tokens: n * (c + n / 2))
        + decode_request_s * (requests that are being answered and get their next token)
        + decode_context_s * (tokens that these have in the KV cache, all together)
    """

    step_s: float
    """Of a step at all: the weights are read once, kernels are started, the scheduler runs."""
    prefill_token_s: float
    """A prompt token through the model."""
    prefill_context_s: float = 0.0
    """A prompt token's attention to one token before it."""
    decode_request_s: float = 0.0
    """A request's next token, beside what the step costs anyway."""
    decode_context_s: float = 0.0
    """One token's keys and values read for it."""

    def step_seconds(self, prompt_tokens: int, prompt_pairs: int, decode_requests: int, decode_context: int) -> float:
        """Return how long a step takes.

        ``prompt_pairs``: the sum of n * (2c + n), which is twice what the formula has and so an integer. The order of the
        operations is the formula's, so that every implementation gets the same float.
        """
        return (
            self.step_s
            + self.prefill_token_s * prompt_tokens
            + self.prefill_context_s * (prompt_pairs / 2)
            + self.decode_request_s * decode_requests
            + self.decode_context_s * decode_context
        )
