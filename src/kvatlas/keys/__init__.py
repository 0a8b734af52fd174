"""Tokens to block keys. Both paths use it, so the keys of an event and of a query cannot diverge."""

from kvatlas.keys.chain import ChainEnd, KeySchema, prompt_extras, shared_blocks
from kvatlas.keys.engine import EngineKeys
from kvatlas.keys.engine_hashes import HashScheme
from kvatlas.keys.llmd import LlmdKeys
from kvatlas.keys.modes import ChainedKeys, KeyRecipe, key_recipe
from kvatlas.keys.tokens import TokenIds, as_token_array

__all__ = [
    "ChainEnd",
    "ChainedKeys",
    "EngineKeys",
    "HashScheme",
    "KeyRecipe",
    "KeySchema",
    "LlmdKeys",
    "TokenIds",
    "as_token_array",
    "key_recipe",
    "prompt_extras",
    "shared_blocks",
]
