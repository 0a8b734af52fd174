"""llm-d's parameters for its index, which sits inside its plugin. Ours is configured on its own: these are read and compared.

Source: llm-d-router, ``pkg/kvcache`` and ``pkg/kvevents``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from kvatlas.config import Config
from kvatlas.errors import ConfigError

_MODES = {"": "llmd-cbor-fnv", "cbor-fnv": "llmd-cbor-fnv", "xxh64": "llmd-xxh64"}
"""Our ``keys.mode`` by llm-d's ``hashAlgorithm``."""


class TokenProcessorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """How llm-d makes block keys. None: left to its default."""

    block_size: int | None = None
    block_size_tokens: int | None = None
    """The newer name."""
    hash_seed: str | None = None
    hash_algorithm: Literal["", "cbor-fnv", "xxh64"] | None = None


class KvBlockIndexConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    in_memory_config: dict[str, Any] | None = None
    redis_config: dict[str, Any] | None = None
    valkey_config: dict[str, Any] | None = None
    cost_aware_memory_config: dict[str, Any] | None = None
    enable_metrics: bool = False
    enable_tracing: bool = False
    metrics_logging_interval: int | str = 0


class IndexerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    prefix_store_config: dict[str, Any] | None = None
    kv_block_index_config: KvBlockIndexConfig | None = None
    kv_block_scorer_config: dict[str, Any] | None = None
    kv_cache_backend_configs: list[dict[str, Any]] | None = None
    tokenizers_pool_config: dict[str, Any] | None = None


class KvEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    zmq_endpoint: str = ""
    topic_filter: str = ""
    concurrency: int = 0
    engine_type: Literal["", "vllm", "sglang"] = ""
    discover_pods: bool = True
    pod_discovery_config: dict[str, Any] | None = None


class LlmdIndex(msgspec.Struct, frozen=True):
    """All of it, as a plugin was given it."""

    tokens: TokenProcessorConfig | None
    indexer: IndexerConfig | None
    events: KvEventsConfig | None

    def compare(self, name: str, config: Config) -> tuple[str, ...]:
        """Return what is given here and has no effect, as notes for who wrote it.

        Raises ConfigError where keys differ that are meant to be llm-d's own (``keys.mode``): they are shared with others, who
        would find nothing. Keys of other modes are made of the same settings on both paths, whatever these are.
        """
        differing = list(self._differing(config))
        if config.keys.mode in _MODES.values() and differing:
            field, given, setting, value = differing[0]
            raise ConfigError(f"{name}.tokenProcessorConfig.{field}", f"{given!r} differs from {setting}", f"{value!r}")
        notes = [
            f"{name}: tokenProcessorConfig.{field} {given!r} has no effect, the index has {setting} {value!r}"
            for field, given, setting, value in differing
        ]
        if self.indexer is not None:
            notes.append(f"{name}: indexerConfig has no effect, the index is configured by index, keys, tieredCache and tokens")
        if self.events is not None:
            notes.append(f"{name}: kvEventsConfig has no effect, events come from where zmq and sources say")
        return tuple(notes)

    def _differing(self, config: Config) -> Iterator[tuple[str, object, str, object]]:
        """Yield what differs: field, value given, our setting, its value."""
        if self.tokens is None:
            return
        keys = config.keys
        field = "blockSizeTokens" if self.tokens.block_size_tokens else "blockSize"
        size = self.tokens.block_size_tokens or self.tokens.block_size
        if size and size != keys.block_size:
            yield field, size, "keys.blockSize", keys.block_size
        if self.tokens.hash_seed is not None and self.tokens.hash_seed != keys.seed:
            yield "hashSeed", self.tokens.hash_seed, "keys.seed", keys.seed
        algorithm = self.tokens.hash_algorithm
        if algorithm is not None and _MODES[algorithm] != keys.mode:
            yield "hashAlgorithm", algorithm, "keys.mode", keys.mode
