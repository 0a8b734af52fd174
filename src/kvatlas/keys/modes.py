"""The kinds of block keys there are. ``docs/keys.md`` says which is for what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from kvatlas.keys.chain import KeySchema
from kvatlas.keys.engine import EngineKeys
from kvatlas.keys.engine_hashes import UNSET_SEED, HashScheme
from kvatlas.keys.llmd import LlmdKeys, LlmdMode

ChainedKeys: TypeAlias = KeySchema | LlmdKeys
"""Keys that follow from tokens and the key before: an event has to say them, and engine hashes are only names."""

KeyRecipe: TypeAlias = ChainedKeys | EngineKeys
"""How a deployment makes block keys. All have ``keys`` (of a prompt), ``confines``, ``block_size_tokens``, ``seed`` and
``mode``."""


def key_recipe(
    mode: Literal["kvatlas", "engine"] | LlmdMode,
    block_size_tokens: int,
    seed: str,
    algorithm: str,
    engine_seed: str | None,
    loras: Mapping[str, str],
) -> KeyRecipe:
    """Return the recipe of a mode. ``engine_seed`` None: PYTHONHASHSEED is not set at the engines."""
    if mode == "kvatlas":
        return KeySchema(block_size_tokens, seed)
    if mode == "engine":
        return EngineKeys(HashScheme(algorithm, UNSET_SEED if engine_seed is None else engine_seed), block_size_tokens, loras)
    return LlmdKeys(block_size_tokens, seed, mode)
