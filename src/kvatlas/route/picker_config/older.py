"""Older forms of plugins, as what they are called and split into today. Pure: entries in, entries and notes out.

Sources: llm-d-router (deprecated types), llm-d-inference-scheduler and gateway-api-inference-extension of 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.picker_config.document import WrittenPlugin

APPROX = "approx-prefix-cache-producer"
PRECISE = "precise-prefix-cache-producer"
PREFIX_SCORER = "prefix-cache-scorer"
PD_DECIDER = "prefix-based-pd-decider"
ALWAYS_PD = "always-disagg-pd-decider"

TYPES = {
    "by-label-selector": "label-selector-filter",
    "kv-cache": "kv-cache-utilization-scorer",
    "kv-cache-scorer": "kv-cache-utilization-scorer",
    "kvcache-aware-scorer": "precise-prefix-cache-scorer",
    "max-score": "max-score-picker",
    "model-server-protocol-metrics": "core-metrics-extractor",
    "model-server-protocol-models": "models-data-extractor",
    "prefix-cache": PREFIX_SCORER,
    "queue": "queue-scorer",
    "random": "random-picker",
    "single-profile": "single-profile-handler",
    "tokenizer": "token-producer",
}
"""Types that only have another name today."""

_OF_APPROX = (
    "autoTune",
    "blockSize",
    "blockSizeTokens",
    "lruCapacityPerServer",
    "maxPrefixBlocksToMatch",
    "maxPrefixTokensToMatch",
)
_OF_PRECISE = ("tokenProcessorConfig", "indexerConfig", "kvEventsConfig", "speculativeIndexing", "speculativeTTL")
_CHARACTERS_PER_TOKEN = 4


class Entry(msgspec.Struct, frozen=True):
    """A plugin of today, and where it is written."""

    name: str
    type: str
    parameters: dict[str, Any]
    path: str


class Modern:
    """Entries as they would be written today."""

    def __init__(self, written: Iterable[WrittenPlugin]) -> None:
        """Raises ConfigError where forms of different times are mixed."""
        self.notes: list[str] = []
        """What took another form, and why."""
        self.entries: list[Entry] = []
        as_written = []
        for position, plugin in enumerate(written):
            kind = TYPES.get(plugin.type, plugin.type)
            as_written.append(Entry(plugin.name or plugin.type, kind, plugin.parameters, f"plugins[{position}]"))
            if kind != plugin.type:
                self.notes.append(f"plugins[{position}]: {plugin.type} is called {kind} today")
        self._written = as_written
        for entry in as_written:
            rewrite = _REWRITES.get(entry.type)
            self.entries += [entry] if rewrite is None else rewrite(self, entry)

    def _prefix_scorer(self, entry: Entry) -> list[Entry]:
        """Matching and scoring were one plugin: ``mode`` or the parameters say which matching."""
        parameters = dict(entry.parameters)
        mode = parameters.pop("mode", None)
        if "hashBlockSize" in parameters:
            parameters["blockSize"] = parameters.pop("hashBlockSize")
        if mode not in (None, "estimate", "cache_tracking"):
            raise ConfigError(f"{entry.path}.parameters.mode", f"{mode!r:.60} is no mode", "estimate, cache_tracking")
        if mode == "cache_tracking" or parameters.keys() & set(_OF_PRECISE):
            return self._split(entry, PRECISE, _precise(parameters), _OF_PRECISE)
        if mode == "estimate" or parameters.keys() & set(_OF_APPROX):
            return self._split(entry, APPROX, parameters, _OF_APPROX)
        return [entry]

    def _precise_scorer(self, entry: Entry) -> list[Entry]:
        """A producer that is configured beside it is used, and its own parameters are not, as in llm-d."""
        producers = [one.name for one in self._written if one.type == PRECISE]
        if len(producers) > 1:
            problem = f"could go by each of {', '.join(producers)}"
            raise ConfigError(entry.path, problem, f"{PREFIX_SCORER} with prefixMatchInfoProducerName")
        if producers:
            self.notes.append(f"{entry.path}: {entry.type} goes by {producers[0]}; its own parameters are not used")
            return [Entry(entry.name, PREFIX_SCORER, {"prefixMatchInfoProducerName": producers[0]}, entry.path)]
        return self._split(entry, PRECISE, _precise(entry.parameters), tuple(entry.parameters) + _OF_PRECISE)

    def _split(self, entry: Entry, producer_type: str, parameters: dict[str, Any], of_producer: tuple[str, ...]) -> list[Entry]:
        producer = self._free(producer_type, f"{entry.name}-producer")
        self.notes.append(f"{entry.path}: {entry.name} became the producer {producer} and a {PREFIX_SCORER}")
        rest = {name: value for name, value in parameters.items() if name not in of_producer}
        return [
            Entry(producer, producer_type, {name: parameters[name] for name in parameters if name in of_producer}, entry.path),
            Entry(entry.name, PREFIX_SCORER, {"prefixMatchInfoProducerName": producer, **rest}, entry.path),
        ]

    def _pd_handler(self, entry: Entry) -> list[Entry]:
        """Its decider has been a plugin of its own since 2026; before that, it had a threshold, in characters."""
        parameters = dict(entry.parameters)
        for unused in ("prefixPluginType", "prefixPluginName", "primaryPort", "prefixMatchInfoProducerName", "hashBlockSize"):
            parameters.pop(unused, None)
        threshold = parameters.pop("threshold", None)
        decider = parameters.setdefault("deciderPluginName", PD_DECIDER)
        added = []
        if decider == PD_DECIDER and PD_DECIDER not in self._names():
            added = [self._decider_of(threshold, entry)]
        self.notes.append(f"{entry.path}: {entry.type} is called disagg-profile-handler today")
        return added + self._disagg_handler(Entry(entry.name, "disagg-profile-handler", parameters, entry.path))

    def _decider_of(self, threshold: object, entry: Entry) -> Entry:
        if threshold is None or (isinstance(threshold, int) and threshold <= 0):
            return Entry(PD_DECIDER, ALWAYS_PD, {}, entry.path)
        if not isinstance(threshold, int) or isinstance(threshold, bool):
            raise ConfigError(f"{entry.path}.parameters.threshold", f"{threshold!r:.60} is no integer", "characters")
        tokens = math.ceil(threshold / _CHARACTERS_PER_TOKEN)
        return Entry(PD_DECIDER, PD_DECIDER, {"nonCachedTokens": tokens}, entry.path)

    def _disagg_handler(self, entry: Entry) -> list[Entry]:
        """Its profiles and deciders had a parameter each."""
        if not any(name in _FLAT for name in entry.parameters):
            return [entry]
        nested: dict[str, Any] = {}
        for name, value in entry.parameters.items():
            if name in ("profiles", "deciders"):
                problem = "is not for a handler with older parameters such as decodeProfile"
                raise ConfigError(f"{entry.path}.parameters.{name}", problem, "either profiles and deciders, or the older ones")
            if name not in _FLAT:
                nested[name] = value
            elif value not in (None, ""):
                section, stage = _FLAT[name]
                nested.setdefault(section, {}).setdefault(stage, value)
        return [Entry(entry.name, entry.type, nested, entry.path)]

    def _ranks_handler(self, entry: Entry) -> list[Entry]:
        """Ranks are endpoints here: whichever is picked is where the request goes."""
        rest = {name: value for name, value in entry.parameters.items() if name != "primaryPort"}
        self.notes.append(f"{entry.path}: {entry.type} is single-profile-handler here; the rank that is picked is the target")
        return [Entry(entry.name, "single-profile-handler", rest, entry.path)]

    def _names(self) -> set[str]:
        return {entry.name for entry in (*self._written, *self.entries)}

    def _free(self, name: str, instead: str) -> str:
        return instead if name in self._names() else name


def _precise(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with ``tokenProcessorConfig`` where it belongs: it was in ``indexerConfig``.

    Without ``maxPrefixBlocksToMatch`` too, which llm-d's own files of early 2026 had in ``kvBlockIndexConfig``, without effect.
    """
    indexer = parameters.get("indexerConfig")
    if not isinstance(indexer, dict):
        return parameters
    indexer = dict(indexer)
    moved = {"tokenProcessorConfig": indexer.pop("tokenProcessorConfig")} if "tokenProcessorConfig" in indexer else {}
    blocks = indexer.get("kvBlockIndexConfig")
    if isinstance(blocks, dict):
        indexer["kvBlockIndexConfig"] = {name: value for name, value in blocks.items() if name != "maxPrefixBlocksToMatch"}
    return {**moved, **parameters, "indexerConfig": indexer}


def _precise_producer(modern: Modern, entry: Entry) -> list[Entry]:
    return [msgspec.structs.replace(entry, parameters=_precise(entry.parameters))]


_FLAT = {
    "decodeProfile": ("profiles", "decode"),
    "prefillProfile": ("profiles", "prefill"),
    "encodeProfile": ("profiles", "encode"),
    "prefillDeciderPluginName": ("deciders", "prefill"),
    "deciderPluginName": ("deciders", "prefill"),
    "encodeDeciderPluginName": ("deciders", "encode"),
}

_REWRITES: dict[str, Callable[[Modern, Entry], list[Entry]]] = {
    PREFIX_SCORER: Modern._prefix_scorer,
    "precise-prefix-cache-scorer": Modern._precise_scorer,
    PRECISE: _precise_producer,
    "pd-profile-handler": Modern._pd_handler,
    "disagg-profile-handler": Modern._disagg_handler,
    "data-parallel-profile-handler": Modern._ranks_handler,
}
