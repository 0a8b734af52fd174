"""The real index behind a policy that hears events."""

from __future__ import annotations

from kvatlas.config import Config, IndexSettings, KeySettings
from kvatlas.indexer import Indexer
from kvatlas.sim.policies.policy import Surroundings


def make_indexer(surroundings: Surroundings) -> Indexer:
    """Return an index on the virtual clock, native where that is installed, that has room for the fleet twice over."""
    defaults = IndexSettings()
    config = Config(
        keys=KeySettings(block_size=surroundings.block_size_tokens),
        index=IndexSettings(max_size=max(defaults.max_size, 2 * surroundings.blocks)),
    )
    return Indexer(config, clock=surroundings.clock)
