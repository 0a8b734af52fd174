"""From a document to a complete configuration: what llm-d adds where nothing is written.

Source: llm-d-router, ``pkg/epp/config/loader`` and ``CreateMissingDataProducers``.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.flow.settings import FlowControl, SaturationDetectorRef
from kvatlas.route.inert.plugin import Inert
from kvatlas.route.parameters import read_parameters, unknown_name
from kvatlas.route.picker_config.catalog import Catalog
from kvatlas.route.picker_config.document import (
    DataLayer,
    Document,
    PluginRef,
    RequestHandler,
    Source,
    WeightedRef,
    WrittenPlugin,
    WrittenProfile,
    feature_gates,
)
from kvatlas.route.picker_config.older import APPROX, PRECISE, PREFIX_SCORER, Entry, Modern
from kvatlas.route.picker_config.spec import PickerConfig, PluginSpec, ProfilePlugin, ProfileSpec
from kvatlas.route.plugins import Filter, Picker, Producer, ProfileHandler, Scorer

MAX_SCORE_PICKER = "max-score-picker"
SINGLE_PROFILE_HANDLER = "single-profile-handler"
UTILIZATION_DETECTOR = "utilization-detector"
METRICS_SOURCE = "metrics-data-source"
METRICS_EXTRACTOR = "core-metrics-extractor"
_MATCHING = (APPROX, PRECISE, "blended-prefix-cache-producer")
"""Who stands in for llm-d's default producer where none is named. Other producers find out other things than caches hold."""
_CONSUMES = "prefix_match_info_producer_name"
"""Whose parameters have this field goes by the matches of a producer."""

_DEFAULT_WEIGHTS = {"queue-scorer": 2.0, "kv-cache-utilization-scorer": 2.0, PREFIX_SCORER: 3.0}
DEFAULT = Document(
    plugins=tuple(WrittenPlugin(kind) for kind in _DEFAULT_WEIGHTS),
    scheduling_profiles=(WrittenProfile("default", tuple(WeightedRef(*one) for one in _DEFAULT_WEIGHTS.items())),),
)
"""What is used where no configuration is given at all."""


def complete(document: Document, catalog: Catalog) -> PickerConfig:
    """Return the configuration that a document stands for. Raises ConfigError."""
    return _Completion(document, catalog).config()


class _Completion:
    def __init__(self, document: Document, catalog: Catalog) -> None:
        self._document = document
        self._catalog = catalog
        modern = Modern(document.plugins)
        self._notes = modern.notes
        self._specs: dict[str, PluginSpec] = {}
        self._classes: dict[str, type] = {}
        for entry in modern.entries:
            self._add(entry)

    def config(self) -> PickerConfig:
        document = self._document
        gates = feature_gates(document.feature_gates)
        flow_control = self._flow_control()
        self._wire_producers()
        written = document.scheduling_profiles or (self._default_profile(),)
        handler = self._handler(len(written))
        profiles = self._profiles(written)
        self._defaults_of(flow_control, gates["flowControl"])
        data_layer = self._data_layer()
        parsers = self._parsers()
        return PickerConfig(
            plugins=tuple(self._specs.values()),
            profiles=profiles,
            handler=handler,
            feature_gates=gates,
            data_layer=data_layer,
            flow_control=flow_control,
            parsers=parsers,
            notes=tuple(self._notes),
        )

    def _add(self, entry: Entry) -> None:
        if entry.name in self._specs:
            raise ConfigError(f"{entry.path}.name", f"{entry.name!r:.80} is there twice", "a name of its own for each plugin")
        kind = self._catalog.find(entry.type, f"{entry.path}.type" if entry.path else "plugins")
        parameters = read_parameters(kind.Parameters, entry.parameters, f"{entry.path or entry.name}.parameters")
        self._specs[entry.name] = PluginSpec(entry.name, entry.type, parameters, entry.path)
        self._classes[entry.name] = kind  # type: ignore[assignment]  # a PluginType is a class
        if isinstance(kind, type) and issubclass(kind, Inert):
            for name in sorted(entry.parameters.keys() - kind.adopted):
                self._notes.append(f"{entry.path}.parameters.{name} has no effect: its work is done by {kind.done_by}")

    def _add_default(self, kind: str, parameters: dict[str, Any] | None = None) -> str:
        if kind not in self._specs:
            self._add(Entry(kind, kind, parameters or {}, ""))
        return kind

    def _are(self, protocol: type) -> list[str]:
        """Return the names of all plugins that do what a Protocol says."""
        return [name for name, kind in self._classes.items() if issubclass(kind, protocol)]

    def _known(self, ref: str, path: str) -> str:
        if ref not in self._specs:
            raise unknown_name(path, "plugin", ref, list(self._specs))
        return ref

    def _wire_producers(self) -> None:
        """Give everybody who goes by a producer the name of one: that of the default where no other is configured."""
        for spec in list(self._specs.values()):
            if _CONSUMES not in spec.parameters.__struct_fields__:
                continue
            named = getattr(spec.parameters, _CONSUMES)
            if not named:
                matching = [one.name for one in self._specs.values() if one.type in _MATCHING]
                named = APPROX if APPROX in self._specs or not matching else matching[0]
            if named == APPROX:
                self._add_default(APPROX)
            path = f"{spec.path}.parameters.prefixMatchInfoProducerName"
            if self._known(named, path) not in self._are(Producer):
                raise ConfigError(path, f"{named} finds no prefixes", ", ".join(self._are(Producer)) or APPROX)
            parameters = msgspec.structs.replace(spec.parameters, **{_CONSUMES: named})
            self._specs[spec.name] = msgspec.structs.replace(spec, parameters=parameters)

    def _default_profile(self) -> WrittenProfile:
        """All filters, scorers and pickers there are."""
        names = [name for name, kind in self._classes.items() if issubclass(kind, (Filter, Scorer, Picker))]
        return WrittenProfile("default", tuple(WeightedRef(name) for name in names))

    def _handler(self, profiles: int) -> str:
        handlers = self._are(ProfileHandler)
        if len(handlers) > 1:
            raise ConfigError("plugins", f"{' and '.join(handlers)} are both profile handlers", "one of them")
        if not handlers and profiles > 1:
            raise ConfigError("plugins", f"none of them says which of {profiles} profiles run", "disagg-profile-handler")
        return handlers[0] if handlers else self._add_default(SINGLE_PROFILE_HANDLER)

    def _profiles(self, written: tuple[WrittenProfile, ...]) -> tuple[ProfileSpec, ...]:
        pickers = self._are(Picker)
        default_picker = pickers[0] if pickers else self._add_default(MAX_SCORE_PICKER)
        made: dict[str, ProfileSpec] = {}
        for position, profile in enumerate(written):
            path = f"schedulingProfiles[{position}]"
            if not profile.name or profile.name in made:
                problem = f"{profile.name!r:.80} is there twice" if profile.name else "is empty"
                raise ConfigError(f"{path}.name", problem, "a name of its own for each profile")
            plugins = []
            for place, one in enumerate(profile.plugins):
                plugins.append(ProfilePlugin(self._known(one.plugin_ref, f"{path}.plugins[{place}].pluginRef"), one.weight))
                if not issubclass(self._classes[one.plugin_ref], (Filter, Scorer, Picker)):
                    self._notes.append(f"{path}.plugins[{place}]: {one.plugin_ref} has nothing to do in a profile")
            picking = [one.plugin for one in plugins if one.plugin in pickers]
            if len(picking) > 1:
                raise ConfigError(f"{path}.plugins", f"{' and '.join(picking)} are both pickers", "one of them")
            made[profile.name] = ProfileSpec(
                profile.name, tuple(plugins) if picking else (*plugins, ProfilePlugin(default_picker))
            )
        return tuple(made.values())

    def _flow_control(self) -> FlowControl:
        """Return the section, with the older top-level saturationDetector in it."""
        section = self._document.flow_control or FlowControl()
        older = self._document.saturation_detector
        if older is None:
            return section
        self._notes.append("saturationDetector is flowControl.saturationDetector today")
        if older.parameters:
            if UTILIZATION_DETECTOR in self._specs:
                problem = f"has parameters, and so has the plugin {UTILIZATION_DETECTOR}"
                raise ConfigError("saturationDetector", problem, "parameters in one of the two places")
            self._add(Entry(UTILIZATION_DETECTOR, UTILIZATION_DETECTOR, older.parameters, "saturationDetector"))
        if section.saturation_detector is not None:
            return section
        detector = SaturationDetectorRef(older.plugin_ref or UTILIZATION_DETECTOR)
        return msgspec.structs.replace(section, saturation_detector=detector)

    def _defaults_of(self, flow_control: FlowControl, gate_open: bool) -> None:
        """Add the plugins of flow control that are there without being written. Other names must be."""
        defaults = FlowControl().plugin_refs()
        for name in defaults:
            self._add_default(name)
        wanted = flow_control.plugin_refs() if gate_open else (flow_control.detector_plugin,)
        for name in wanted:
            self._known(name, "flowControl")

    def _data_layer(self) -> DataLayer:
        document = self._document
        section = document.data_layer or document.data or DataLayer()
        if document.data is not None:
            self._notes.append("data is called dataLayer today")
        for position, source in enumerate(section.sources):
            path = f"dataLayer.sources[{position}]"
            self._known(source.plugin_ref, f"{path}.pluginRef")
            for place, extractor in enumerate(source.extractors):
                self._known(extractor.plugin_ref, f"{path}.extractors[{place}].pluginRef")
        for name, ref in (("discovery", section.discovery), ("peerDiscovery", section.peer_discovery)):
            if ref is not None:
                self._known(ref.plugin_ref, f"dataLayer.{name}.pluginRef")
        if section.cross_replica_syncer_plugin_ref:
            self._known(section.cross_replica_syncer_plugin_ref, "dataLayer.crossReplicaSyncerPluginRef")
        if not section.inject_defaults or any(source.plugin_ref == METRICS_SOURCE for source in section.sources):
            return section
        default = Source(self._add_default(METRICS_SOURCE), (PluginRef(self._add_default(METRICS_EXTRACTOR)),))
        return msgspec.structs.replace(section, sources=(*section.sources, default))

    def _parsers(self) -> tuple[str, ...]:
        """Return the parsers asked for; one that is not configured may be named by its type."""
        parsers = (self._document.request_handler or RequestHandler()).parsers
        if self._document.parser is not None:
            self._notes.append("parser is one of requestHandler.parsers today")
            parsers = parsers or (self._document.parser,)
        for position, parser in enumerate(parsers):
            if parser.plugin_ref not in self._specs and parser.plugin_ref in self._catalog:
                self._add_default(parser.plugin_ref)
            self._known(parser.plugin_ref, f"requestHandler.parsers[{position}].pluginRef")
        return tuple(parser.plugin_ref for parser in parsers)
