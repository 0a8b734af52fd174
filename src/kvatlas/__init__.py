"""kvatlas: which KV-cache blocks sit on which LLM engine, and who holds the longest prefix of a prompt."""

from __future__ import annotations

from kvatlas.cache_scorer import CacheScorer
from kvatlas.config import Config, load_config
from kvatlas.errors import KvatlasError
from kvatlas.indexer import Indexer
from kvatlas.results import PodScore, Query, ScoreResult
from kvatlas.types import BlockKey, Frame, MultimodalItem, PodId, Stream

__version__ = "0.1.0"

__all__ = [
    "BlockKey",
    "CacheScorer",
    "Config",
    "Frame",
    "Indexer",
    "KvatlasError",
    "MultimodalItem",
    "PodId",
    "PodScore",
    "Query",
    "ScoreResult",
    "Stream",
    "load_config",
]
