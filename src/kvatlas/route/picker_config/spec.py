"""What an EndpointPickerConfig comes to: every plugin and profile that there will be, defaults included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from kvatlas.route.flow.settings import FlowControl
from kvatlas.route.picker_config.document import DataLayer

P = TypeVar("P", bound=msgspec.Struct)


class PluginSpec(msgspec.Struct, frozen=True):
    """A plugin to be made."""

    name: str
    type: str
    """As it is called today."""
    parameters: msgspec.Struct
    """The type's own ``Parameters``."""
    path: str = ""
    """Where it is written. Empty: nowhere, it is a default."""


class ProfilePlugin(msgspec.Struct, frozen=True):
    plugin: str
    weight: float = 1.0
    """Of no meaning for a plugin that is no scorer."""


class ProfileSpec(msgspec.Struct, frozen=True):
    """A profile to be made: its plugins in the order in which they run."""

    name: str
    plugins: tuple[ProfilePlugin, ...]


class PickerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration, complete and checked."""

    plugins: tuple[PluginSpec, ...]
    """In the order in which they are written; producers run in it."""
    profiles: tuple[ProfileSpec, ...]
    handler: str
    """The plugin that says which profiles run."""
    feature_gates: Mapping[str, bool]
    data_layer: DataLayer
    """For discovery and for the polling of engines' metrics."""
    flow_control: FlowControl
    """For saturation and queues. Without the gate ``flowControl`` only its detector matters."""
    parsers: tuple[str, ...]
    """Plugins that say which request bodies are read; empty: all that the front door knows."""
    notes: tuple[str, ...] = ()
    """What a person should know: older forms, and what does nothing."""

    @property
    def flow_control_on(self) -> bool:
        return self.feature_gates["flowControl"]

    def plugin(self, name: str) -> PluginSpec | None:
        """Return a plugin by its name."""
        return next((one for one in self.plugins if one.name == name), None)

    def parameters_of(self, kind: type[P]) -> tuple[P, ...]:
        """Return the parameters of all plugins whose parameters are of a kind, such as ``MetricsDataSource.Parameters``."""
        return tuple(one.parameters for one in self.plugins if type(one.parameters) is kind)
