"""Plugin types by name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint

from kvatlas.errors import ConfigError
from kvatlas.route.parameters import near_names
from kvatlas.route.plugins import PluginType, plugin_types

NOT_HERE = frozenset(
    {
        "agent-identity",
        "dcgm-data-source",
        "dcgm-extractor",
        "destination-endpoint-served-verifier",
        "disaggregatedset-rollout-screener",
        "endpoint-attribute-filter",
        "endpoint-attribute-scorer",
        "header-based-testing-filter",
        "header-label-affinity-scorer",
        "header-profile-handler",
        "latency-slo-admitter",
        "mm-embeddings-cache-producer",
        "mm-embeddings-cache-scorer",
        "multicluster-approx-prefix-cache-producer",
        "multicluster-file-discovery",
        "multicluster-kv-cache-utilization-scorer",
        "multicluster-metrics-data-source",
        "multicluster-metrics-extractor",
        "multicluster-prefix-cache-scorer",
        "multicluster-queue-scorer",
        "multicluster-session-affinity-filter",
        "p2p-source-producer",
        "predicted-latency-producer",
        "predicted-latency-scorer",
        "probabilistic-admitter",
        "request-attribute-reporter",
        "slo-headroom-tier-filter",
        "topology-affinity-filter",
        "topology-affinity-scorer",
        "topology-extractor",
        "utilization-filter",
        "vertexai-parser",
        "vllmgrpc-parser",
    }
)
"""Types that llm-d has, for an error that says so. One that is installed is used all the same."""


class Catalog:
    """What plugins can be made of."""

    def __init__(self, types: Mapping[str, EntryPoint | PluginType] | None = None) -> None:
        """``types``: by name; None: all that are installed. Classes are loaded when they are first asked for."""
        self._types = dict(plugin_types() if types is None else types)

    def __contains__(self, name: object) -> bool:
        return name in self._types

    def find(self, name: str, path: str) -> PluginType:
        """Return a type. Raises ConfigError, with the ``path`` that names it, where there is none or it can't be loaded."""
        found = self._types.get(name)
        if found is None:
            problem = "is a plugin type of llm-d that is not here" if name in NOT_HERE else "is no plugin type"
            near = near_names(name, list(self._types))
            raise ConfigError(path, f"{name!r:.80} {problem}", ", ".join(near or sorted(self._types)))
        if isinstance(found, EntryPoint):
            try:
                loaded: PluginType = found.load()
            except Exception as error:  # whatever another package's module does when it is imported
                raise ConfigError(
                    path, f"{name} can't be loaded: {error}", "a type whose package is installed whole"
                ) from error
            found = self._types[name] = loaded
        return found
