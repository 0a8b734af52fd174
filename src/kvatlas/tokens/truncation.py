"""What the engine does about prompts that are too long: cut them as asked, or refuse them.

Rules of vLLM 0.32 (``renderers/params.py``).
``truncate_prompt_tokens`` asks for it. Without a ``truncation_side`` the text's own tokens are cut and what the tokenizer puts
around them stays (a BOS in front survives a cut on the left); with one, all tokens are cut alike.
"""

from __future__ import annotations

from array import array
from typing import Literal

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.prompts import Truncation

_DEFAULT_SIDE: Literal["left"] = "left"
"""vLLM loads tokenizers of generating models with truncation_side="left", whatever their tokenizer_config.json says."""
_TOKENS_MAX = 2**63 - 1


def truncate(
    tokens: array[int],
    truncation: Truncation | None,
    max_model_len: int | None,
    *,
    before: int = 0,
    after: int = 0,
    max_output_tokens: int = 0,
) -> array[int]:
    """Return the tokens of a prompt that the engine works on.

    ``before`` and ``after``: how many of ``tokens`` the tokenizer put around the text. ``max_model_len`` None: not known, and
    nothing is refused for its length. ``max_output_tokens``: the request's ``max_tokens`` (a completion's default is 16, a
    chat's none); where it asks for any, -1 leaves one token of room for them. Raises TokenizationError: BAD_TRUNCATION for
    what cannot be asked, TOO_MANY_TOKENS where the engine refuses the prompt (also one that leaves no room for a generated
    token), BAD_TEXT where no token is left.
    """
    if max_model_len is not None and max_output_tokens > max_model_len:
        raise TokenizationError(
            TokenizationReason.TOO_MANY_TOKENS,
            "max_tokens",
            f"{max_output_tokens} tokens are to be generated, and the model takes {max_model_len} in all",
            "ask for fewer, or set tokens.maxModelLen as the engine runs",
        )
    limit = tokens_kept(truncation, max_model_len, max_output_tokens)
    if limit is not None and limit < len(tokens):
        tokens = _cut(tokens, limit, truncation.side if truncation else None, before, after)
    if max_model_len is not None and len(tokens) >= max_model_len:
        raise TokenizationError(
            TokenizationReason.TOO_MANY_TOKENS,
            "prompt",
            f"{len(tokens)} tokens, and the model takes {max_model_len}, one generated token among them",
            "shorten it, set truncate_prompt_tokens, or set tokens.maxModelLen as the engine runs",
        )
    if not tokens:
        raise TokenizationError(TokenizationReason.BAD_TEXT, "prompt", "it has no tokens", "the engine wants one at least")
    return tokens


def trim_text(text: str, truncation: Truncation | None, max_model_len: int | None, chars_per_token_max: int) -> str:
    """Return the part of a text that the engine tokenizes; raise TOO_MANY_TOKENS where it refuses the text unread.

    It takes no text longer than ``max_model_len`` tokens of the longest kind (``chars_per_token_max`` characters). Where a side
    was named with the truncation, it cuts the text there instead, which may change the tokens at the cut.
    """
    if max_model_len is None:
        return text
    chars_max = max_model_len * chars_per_token_max
    if len(text) <= chars_max:
        return text
    if truncation is None:
        raise TokenizationError(
            TokenizationReason.TOO_MANY_TOKENS,
            "prompt",
            f"{len(text)} characters, and {max_model_len} tokens have {chars_max} at most",
            "shorten it, set truncate_prompt_tokens, or set tokens.maxModelLen as the engine runs",
        )
    if truncation.side is None:
        return text
    if truncation.side == "left":
        return text[-chars_max:]
    return text[:chars_max]


def tokens_kept(truncation: Truncation | None, max_model_len: int | None, max_output_tokens: int) -> int | None:
    """Return how many tokens of a prompt may stay; None: all of them. Raises TokenizationError, BAD_TRUNCATION."""
    if truncation is None:
        return None
    asked = truncation.tokens
    if type(asked) is not int or not -1 <= asked <= _TOKENS_MAX:
        raise _refusal(f"{asked!r}", "a number of tokens, or -1 for as many as the model takes")
    if truncation.side not in (None, "left", "right"):
        raise TokenizationError(
            TokenizationReason.BAD_TRUNCATION, "truncation_side", f"{truncation.side!r}", 'allowed: "left", "right"'
        )
    if asked == 0:
        raise _refusal("no token would be left", "1 or more, or -1 for as many as the model takes")
    if asked > 0:
        if max_model_len is not None and asked > max_model_len:
            raise _refusal(f"{asked} is more than the model takes", f"up to {max_model_len}, or -1 for as many as it takes")
        return asked
    if max_model_len is None:
        return None
    return max_model_len if max_output_tokens == 0 else max(0, max_model_len - 1)


def _cut(tokens: array[int], limit: int, side: Literal["left", "right"] | None, before: int, after: int) -> array[int]:
    around = before + after
    if side is None and limit >= around:  # the tokenizer cuts, and its own tokens stay
        end = len(tokens) - after
        return tokens[:before] + tokens[end - (limit - around) : end] + tokens[end:]
    if (side or _DEFAULT_SIDE) == "left":
        return tokens[len(tokens) - limit :]
    return tokens[:limit]


def _refusal(problem: str, allowed: str) -> TokenizationError:
    return TokenizationError(TokenizationReason.BAD_TRUNCATION, "truncate_prompt_tokens", problem, f"allowed: {allowed}")
