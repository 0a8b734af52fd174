"""Tokens to block keys. Both paths use it, so the keys of an event and of a query cannot diverge."""

from kvatlas.keys.chain import ChainEnd, KeySchema, prompt_extras
from kvatlas.keys.tokens import TokenIds, as_token_array

__all__ = ["ChainEnd", "KeySchema", "TokenIds", "as_token_array", "prompt_extras"]
