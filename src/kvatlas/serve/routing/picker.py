"""The picker configuration of a service, and what it says of matters that kvatlas has settings for."""

from __future__ import annotations

import urllib.parse

from msgspec.structs import replace

from kvatlas.config import Config, TokenSettings
from kvatlas.config.quantities import Seconds
from kvatlas.config.route import PollSettings, RouteSettings
from kvatlas.route.inert.data_layer import FileDiscovery, MetricsDataSource
from kvatlas.route.inert.requests import TokenProducer
from kvatlas.route.picker_config import PickerConfig, load_config, read_config

OURS = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: blended-prefix-cache-producer}
- {type: decode-filter}
- {type: expected-ttft-scorer}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: decode-filter}, {pluginRef: expected-ttft-scorer}]}
"""
"""What decides where no other configuration is given."""


def picker_of(settings: RouteSettings) -> PickerConfig:
    """Return the configuration that decides. Raises ConfigError for one that is none."""
    return load_config(settings.picker_config) if settings.picker_config else read_config(OURS, "kvatlas")


def adopt(config: Config, picker: PickerConfig) -> tuple[Config, list[str]]:
    """Return the settings with what the picker configuration says of endpoints, polls and tokens, and notes of what was left.

    Settings of kvatlas go first: what is named there, or is other than its default, stays.
    """
    notes: list[str] = []
    route = _polls(_endpoints(config.route, picker, notes), picker, notes)
    return replace(config, route=route, tokens=_tokens(config, picker, notes)), notes


def _endpoints(route: RouteSettings, picker: PickerConfig, notes: list[str]) -> RouteSettings:
    discovery = picker.data_layer.discovery
    plugin = None if discovery is None else picker.plugin(discovery.plugin_ref)
    if plugin is None or not isinstance(given := plugin.parameters, FileDiscovery.Parameters):
        return route
    if route.endpoint_sources:
        notes.append(f"{plugin.path}.parameters.path has no effect: {route.endpoint_sources[0]} goes first")
        return route
    return replace(route, endpoints_file=given.path, watch_file=route.watch_file and given.watch_file)


def _polls(route: RouteSettings, picker: PickerConfig, notes: list[str]) -> RouteSettings:
    for plugin in filter(None, (picker.plugin(source.plugin_ref) for source in picker.data_layer.sources)):
        given = plugin.parameters
        if not isinstance(given, MetricsDataSource.Parameters) or not given.interval:
            continue
        if route.polls.interval == PollSettings().interval:
            return replace(route, polls=replace(route.polls, interval=Seconds(given.interval)))
        notes.append(f"{plugin.path}.parameters.interval has no effect: route.polls.interval goes first")
    return route


def _tokens(config: Config, picker: PickerConfig, notes: list[str]) -> TokenSettings:
    tokens = config.tokens
    for plugin in picker.plugins:
        given = plugin.parameters
        if not isinstance(given, TokenProducer.Parameters) or not (given.service_address or given.asked_renderer):
            continue
        if tokens.configured:
            notes.append(f"{plugin.path}.parameters: nobody is asked there for tokens, the section tokens goes first")
        elif given.service_address is not None:
            return replace(tokens, service=replace(tokens.service, address=given.service_address))
        elif (renderer := given.asked_renderer) is not None:
            if _is_the_proxy(renderer.url, config):
                notes.append(f"{plugin.path}.parameters: nobody is asked for tokens, {renderer.url} is this proxy itself")
                continue
            timeout = Seconds(renderer.timeout)
            return replace(tokens, renderer=replace(tokens.renderer, endpoints=(renderer.url,), timeout=timeout))
    return tokens


def _is_the_proxy(url: str, config: Config) -> bool:
    parts = urllib.parse.urlsplit(url)
    here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    return "proxy" in config.route.front_doors and here and parts.port == config.proxy.port
