"""How long one step of an engine takes."""

from __future__ import annotations

import msgspec


class EngineCosts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one step of an engine, as a sum; all of them 0 or more.

    A step computes a chunk of some prompts and one token of each request that is being answered:

        step_s
        + prefill_token_s * (prompt tokens computed)
        + prefill_context_s * (for each chunk of n tokens behind c tokens: n * (c + n / 2))
        + decode_request_s * (requests that get a token)
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
