"""An EndpointPickerConfig as it is written: text to structs, strictly.

Source: llm-d-router, ``apix/config/v1alpha1``; older fields: gateway-api-inference-extension of 2025.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from kvatlas.config.layers import parse_yaml
from kvatlas.errors import ConfigError
from kvatlas.route.flow.settings import FlowControl
from kvatlas.route.parameters import GoDuration, read_parameters, unknown_name

BYTES_MAX = 256 << 10
"""Larger ones are refused unread: real ones have a few thousand bytes, and YAML is slow to parse."""

API_VERSIONS = ("llm-d.ai/v1alpha1", "llm-d.ai/v1", "inference.networking.x-k8s.io/v1alpha1")
KIND = "EndpointPickerConfig"

FEATURE_GATES = {"flowControl": False, "haPopulateNonLeaderDatastore": True}
"""With their defaults."""
OLDER_FEATURE_GATES = ("dataLayer", "prepareDataPlugins", "enableLegacyMetrics")
"""Of 2025: read, and without effect. What the first two switched on is always on."""


class PluginRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    plugin_ref: str


class WrittenPlugin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of ``plugins``."""

    type: str
    name: str = ""
    parameters: dict[str, Any] = {}


class WeightedRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    plugin_ref: str
    weight: float = 1.0


class WrittenProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    plugins: tuple[WeightedRef, ...] = ()


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Where something is read from, and what makes sense of it."""

    plugin_ref: str
    extractors: tuple[PluginRef, ...] = ()


class DataLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """The section ``dataLayer``."""

    inject_defaults: bool = True
    """Whether engines' metrics are read though no source says so."""
    sources: tuple[Source, ...] = ()
    discovery: PluginRef | None = None
    """The plugin that finds endpoints. None: Kubernetes, or whatever the router is started with."""
    peer_discovery: PluginRef | None = None
    cross_replica_syncer_plugin_ref: str = ""
    cross_replica_sync_interval: GoDuration | None = None


class RequestHandler(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    parsers: tuple[PluginRef, ...] = ()


class OlderSaturationDetector(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """The top-level section of 2025, with what are now parameters of the plugin ``utilization-detector``."""

    plugin_ref: str = ""
    queue_depth_threshold: Any = None
    kv_cache_util_threshold: Any = msgspec.field(default=None, name="kvCacheUtilThreshold")
    metrics_staleness_threshold: Any = None

    @property
    def parameters(self) -> dict[str, Any]:
        fields = msgspec.to_builtins(self)
        return {name: value for name, value in fields.items() if name != "pluginRef" and value is not None}


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", kw_only=True):
    """The whole of it."""

    api_version: str = API_VERSIONS[0]
    kind: str = KIND
    feature_gates: tuple[str, ...] = ()
    plugins: tuple[WrittenPlugin, ...] = ()
    scheduling_profiles: tuple[WrittenProfile, ...] = ()
    data_layer: DataLayer | None = None
    flow_control: FlowControl | None = None
    request_handler: RequestHandler | None = None
    saturation_detector: OlderSaturationDetector | None = None
    parser: PluginRef | None = None
    """Older: one of ``requestHandler.parsers``."""
    data: DataLayer | None = None
    """Older: ``dataLayer``."""


def read_text(file: str | os.PathLike[str]) -> str:
    """Return a file's text. Raises ConfigError where it can't be read or is too large."""
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError(str(file), f"can't be read: {problem}", "a readable EndpointPickerConfig") from None
    if len(content) > BYTES_MAX:
        raise ConfigError(str(file), f"is larger than {BYTES_MAX} bytes", "an EndpointPickerConfig")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(str(file), f"is not UTF-8 at byte {error.start}", "YAML in UTF-8") from None


def parse(text: str, source: str) -> Document:
    """Return the document that a text stands for. Raises ConfigError; ``source`` names the text where no field can be named."""
    if len(text) > BYTES_MAX:
        raise ConfigError(source, f"is larger than {BYTES_MAX} bytes", "an EndpointPickerConfig")
    tree = parse_yaml(text, source)
    if not isinstance(tree, dict):
        raise ConfigError(source, f"{tree!r:.60} is no {KIND}", "sections such as plugins and schedulingProfiles")
    document = read_parameters(Document, tree, "")
    if document.api_version not in API_VERSIONS:
        raise ConfigError("apiVersion", f"{document.api_version!r:.80} is not known", ", ".join(API_VERSIONS))
    if document.kind != KIND:
        raise ConfigError("kind", f"{document.kind!r:.80} is something else", KIND)
    return document


def feature_gates(written: tuple[str, ...]) -> dict[str, bool]:
    """Return every gate, open or not; ``name`` alone opens it. Source: llm-d-router, ``loadFeatureConfig``."""
    gates = dict(FEATURE_GATES)
    for position, text in enumerate(written):
        path = f"featureGates[{position}]"
        name, given, value = text.partition("=")
        if name not in FEATURE_GATES and name not in OLDER_FEATURE_GATES:
            raise unknown_name(path, "feature gate", name, list(FEATURE_GATES))
        opened = _BOOLEANS.get(value.strip().lower()) if given else True
        if opened is None:
            raise ConfigError(path, f"{value!r:.60} is neither true nor false", f"{name}=true, {name}=false")
        if name in FEATURE_GATES:
            gates[name] = opened
    return gates


_BOOLEANS = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
